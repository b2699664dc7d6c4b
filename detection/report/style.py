"""The page's style sheet: two themes by the reader's setting, one column on a phone, pictures that follow the theme."""

from __future__ import annotations

LIGHT = """
--bg:#ffffff;--fg:#1b1f24;--muted:#4f5965;--line:#d0d7de;--panel:#f6f8fa;--link:#0a58b0;
--c1:#0a66c2;--c2:#b04a00;--c3:#00735c;--c4:#8a3ea8;--c5:#7a5c00;--c6:#a3195b;
"""
DARK = """
--bg:#0f1419;--fg:#e6edf3;--muted:#a3b0bd;--line:#343c45;--panel:#181e25;--link:#7cbcff;
--c1:#6cb6ff;--c2:#ff9e64;--c3:#56d4a8;--c4:#d2a8ff;--c5:#e3c04d;--c6:#ff8ac0;
"""
SERIES = "".join(f".s{i}{{--c:var(--c{i})}}" for i in range(1, 7))
DASH = {2: "6 3", 3: "2 2", 4: "8 3 2 3", 5: "1 3", 6: "10 4"}
DASHES = "".join(f".line.s{i}{{stroke-dasharray:{dash}}}" for i, dash in DASH.items())

STYLE = (
    f":root{{{LIGHT}}}@media (prefers-color-scheme:dark){{:root{{{DARK}}}}}"
    + SERIES
    + DASHES
    + """
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;scroll-padding-top:.5rem}
body{margin:0;background:var(--bg);color:var(--fg);font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1180px;margin:0 auto;padding:1rem}
h1{font-size:1.5rem;line-height:1.2;margin:.2rem 0 .4rem;overflow-wrap:anywhere}
h2{font-size:1.25rem;margin:2rem 0 .5rem;padding-top:.6rem;border-top:1px solid var(--line);overflow-wrap:anywhere}
h3{font-size:1.05rem;margin:1.6rem 0 .4rem}
.title{font-size:.95rem;font-weight:600;margin:.2rem 0 .3rem}
p{margin:.4rem 0;max-width:75ch;overflow-wrap:anywhere}
a{color:var(--link)}
.muted{color:var(--muted);font-size:.9rem}
nav ul{display:flex;flex-wrap:wrap;gap:.3rem 1rem;list-style:none;margin:.6rem 0;padding:0}
nav a{display:inline-block;padding:.2rem 0}
.scroll{overflow-x:auto;max-width:100%;margin:.5rem 0}
.scroll:focus-visible{outline:2px solid var(--link);outline-offset:2px}
table{border-collapse:collapse;font-size:.875rem;line-height:1.35}
caption{text-align:left;color:var(--muted);padding:.2rem 0 .4rem}
th,td{padding:.28rem .6rem;text-align:left;border-bottom:1px solid var(--line);vertical-align:top}
th:first-child,td:first-child{padding-left:.2rem}
thead th{color:var(--muted);font-weight:600;vertical-align:bottom}
tbody th{font-weight:500;max-width:22rem;overflow-wrap:anywhere}
.short{white-space:nowrap}
.long{min-width:16rem;overflow-wrap:anywhere}
td.n{font-variant-numeric:tabular-nums;white-space:nowrap}
.settings{font-size:.8rem;color:var(--muted);margin:.2rem 0 .8rem;padding-left:1.1rem;max-width:95ch}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(8.5rem,1fr));gap:.6rem;margin:.8rem 0;padding:0}
.tiles>div{background:var(--panel);border:1px solid var(--line);border-radius:.4rem;padding:.5rem .7rem}
.tiles dt{color:var(--muted);font-size:.8rem}
.tiles dd{margin:0;font-size:1.3rem;font-variant-numeric:tabular-nums}
.tiles dd small{display:block;font-size:.75rem;color:var(--muted)}
.gallery{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,330px),1fr));gap:1rem;margin:.6rem 0}
.gallery.paired{max-width:calc(66.7% - .33rem);min-width:min(100%,680px)}
figure{margin:0;background:var(--panel);border:1px solid var(--line);border-radius:.4rem;padding:.7rem;min-width:0}
figure svg{display:block;width:100%;max-width:520px;height:auto;margin:0 auto}
figcaption{font-size:.85rem;color:var(--muted);margin-top:.4rem;overflow-wrap:anywhere}
details{margin:.4rem 0}
summary{cursor:pointer;padding:.25rem 0;font-size:.875rem;color:var(--link);overflow-wrap:anywhere}
details.run>summary{font-size:1.1rem;font-weight:600}
.legend{display:flex;flex-wrap:wrap;gap:.15rem .9rem;list-style:none;margin:.3rem 0 0;padding:0;font-size:.8rem}
.key{display:inline-block;width:1.2rem;height:.65rem;margin-right:.35rem;background:var(--c);border-radius:2px}
figure .legend svg.stroke{display:inline-block;width:26px;height:8px;margin:0 .35rem .1rem 0}
svg text{fill:var(--fg);font:11px system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
svg text.tick,svg text.name{fill:var(--muted)}
svg text.cell{font-size:10.5px}
svg text.mid{text-anchor:middle}
svg text.end{text-anchor:end}
.grid{stroke:var(--line);stroke-width:1}
.axis{stroke:var(--muted);stroke-width:1}
.ideal{stroke:var(--muted);stroke-width:1.2;stroke-dasharray:4 3}
.line{fill:none;stroke:var(--c);stroke-width:2;stroke-linejoin:round}
.thin{fill:none;stroke:var(--c);stroke-width:1.3;stroke-linejoin:round}
.fill{fill:var(--c)}
.soft{fill:var(--c);fill-opacity:.35;stroke:var(--c)}
.whisker{stroke:var(--fg);stroke-width:1.2}
.empty{fill:none;stroke:var(--line)}
.edge{fill:none;stroke:var(--bg);stroke-width:1}
.found{fill:none;stroke:#ff7a1a;stroke-width:2.2}
.truth{fill:none;stroke:#35a7ff;stroke-width:2.2;stroke-dasharray:5 3}
.halo{fill:none;stroke:#000;stroke-opacity:.55;stroke-width:4}
pre{font-size:.8rem;background:var(--panel);padding:.6rem;border-radius:.4rem;max-height:28rem;overflow:auto}
.missing{color:var(--muted);border:1px dashed var(--line);padding:1rem;font-size:.85rem;overflow-wrap:anywhere}
@media print{body{font-size:12px}figure,tr{break-inside:avoid}}
"""
)
