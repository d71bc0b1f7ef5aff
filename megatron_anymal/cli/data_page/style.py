"""Style sheet of the page."""

STYLE = """
:root{color-scheme:light dark;--text:#222;--quiet:#5b6166;--ground:#fff;--panel:#f6f7f8;--rule:#d5d9dc;
  --link:#1f618d;--target:#fdebc8;--target-rule:#b9770e;--bad:#a93226;--bad-ground:#fbeae8;--soft:#dfeaf4;
  --soft-rule:#1f618d;--c0:#1f618d;--c1:#b9770e;--c2:#196f3d;--c3:#922b21;--c4:#6c3483;--c5:#5f6a6a}
@media(prefers-color-scheme:dark){
  :root{--text:#e4e6e8;--quiet:#a2a9af;--ground:#16191c;--panel:#1f2327;--rule:#3a4147;--link:#7fb8e0;
  --target:#4a3710;--target-rule:#e8ab3f;--bad:#f0948a;--bad-ground:#3a1f1d;--soft:#1c3145;--soft-rule:#7fb8e0;
  --c0:#6fb0dd;--c1:#e8ab3f;--c2:#6cc48d;--c3:#ef8a7e;--c4:#c59be0;--c5:#aab4b4}
}
*{box-sizing:border-box}
html{scroll-padding-top:3.2em}
body{font:15px/1.5 system-ui,sans-serif;max-width:76em;margin:0 auto;padding:0 1em 4em;color:var(--text);
  background:var(--ground);overflow-wrap:anywhere}
a{color:var(--link)}
:focus-visible{outline:3px solid var(--link);outline-offset:2px;border-radius:3px}
h1{font-size:1.7em;line-height:1.2;margin:1em 0 .2em}
h2{margin:2.2em 0 .4em;border-bottom:1px solid var(--rule)}
h3{margin:1.4em 0 .3em;font-size:1.05em}
p{margin:.4em 0;max-width:52em}
code{font-size:.92em}
small,.quiet,figcaption small,dt,.axes{color:var(--quiet)}
nav{position:sticky;top:0;z-index:2;background:var(--ground);border-bottom:1px solid var(--rule);display:flex;
  gap:.2em 1.2em;overflow-x:auto;white-space:nowrap;padding:.5em 1em;margin:0 -1em}
.tiles,dl{display:flex;flex-wrap:wrap;gap:.8em;margin:1em 0}
.tiles>div{flex:1 1 8.5em;background:var(--panel);border:1px solid var(--rule);border-radius:6px;padding:.5em .8em}
.tiles b{display:block;font-size:1.45em;line-height:1.25;font-variant-numeric:tabular-nums}
.tiles span{color:var(--quiet);font-size:.9em}
dl{gap:.2em 1.6em;margin:.4em 0}
dl>div{display:flex;gap:.45em}
dt{flex:none}
dd{margin:0;font-variant-numeric:tabular-nums}
.scroll{overflow-x:auto;margin:.3em 0 1.2em}
table{border-collapse:collapse;font-variant-numeric:tabular-nums}
td,th{padding:.28em .8em .28em 0;border-bottom:1px solid var(--rule);text-align:left;vertical-align:baseline;
  font-weight:400;min-width:3.5em}
thead th{color:var(--quiet);font-size:.9em;vertical-align:bottom}
td,th{overflow-wrap:normal}
td:has(ul),td:has(ul)~td,td:has(code){overflow-wrap:anywhere}
td:has(ul){min-width:17em}
td code{display:inline-block;min-width:8em}
td ul{margin:0}
.n{text-align:right;white-space:nowrap}
.bar{display:inline-flex;width:4.5em;height:.7em;background:var(--panel);border:1px solid var(--rule);
  vertical-align:baseline}
.bar i{background:var(--c0)}
.bar.wide{width:min(26em,58vw);height:1em}
.bar i.answer,.key i.answer{background:var(--c1)}
.bar i.prompt,.key i.prompt{background:var(--c5)}
.bar i.media,.key i.media{background:var(--c0)}
.bar i.filler,.key i.filler,.strip .filler{background:repeating-linear-gradient(45deg,var(--rule) 0 2px,
  transparent 2px 6px)}
.key{display:flex;flex-wrap:wrap;gap:.2em 1.2em;font-size:.92em}
.key i{display:inline-block;width:1em;height:1em;border:1px solid var(--rule);vertical-align:-.12em}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,18em),1fr));gap:1em 1.6em}
figure{margin:.6em 0}
figcaption{margin-bottom:.3em}
.axes{display:grid;grid-template-columns:auto 1fr;font-size:.85em;gap:.2em .4em}
.y{display:flex;flex-direction:column;justify-content:space-between;text-align:right;min-width:3.2em}
.y em{writing-mode:vertical-rl;transform:rotate(180deg);align-self:flex-end;line-height:1.1;font-style:normal}
.x{grid-column:2;display:flex;justify-content:space-between;gap:.6em}
.x em{font-style:normal}
.area{position:relative;height:8.5em;border-left:1px solid var(--quiet);border-bottom:1px solid var(--quiet);
  background:var(--panel)}
.area>svg,.area>img{position:absolute;inset:0;width:100%;height:100%}
.bars{position:absolute;inset:0;display:flex;align-items:flex-end;gap:1px}
.bars i{flex:1;background:var(--c0);min-height:0}
.area hr{position:absolute;top:0;bottom:0;margin:0;border:0;border-left:2px dashed var(--c3)}
.line{fill:none;stroke-width:1.6;vector-effect:non-scaling-stroke}
.border{stroke:var(--quiet);stroke-dasharray:2 4;vector-effect:non-scaling-stroke}
.s0{stroke:var(--c0)}
.s1{stroke:var(--c1);stroke-dasharray:7 3}
.s2{stroke:var(--c2);stroke-dasharray:2 3}
.s3{stroke:var(--c3)}
.s4{stroke:var(--c4);stroke-dasharray:7 3}
.s5{stroke:var(--c5);stroke-dasharray:2 3}
.legend{display:flex;flex-wrap:wrap;gap:.1em 1.2em;font-size:.9em}
.strip{display:flex;height:2.4em;border:1px solid var(--rule);margin:.5em 0 .1em;border-radius:3px;overflow:hidden}
.strip>*{min-width:1px;flex-basis:0;border-right:2px solid var(--ground);background:var(--soft);
  color:var(--text);overflow:hidden;font-size:.82em;line-height:2.9;text-align:center;text-decoration:none;
  white-space:nowrap}
.strip a{background:var(--c0);color:var(--ground);font-weight:600;text-decoration:underline}
.strip .bad{background:var(--bad);color:var(--ground)}
.strip a:focus-visible{outline-offset:-4px;outline-color:var(--ground)}
.ends{display:flex;justify-content:space-between;font-size:.85em;color:var(--quiet)}
article{border:1px solid var(--rule);border-radius:8px;padding:.2em 1em .9em;margin:1.2em 0}
article.bad{border:2px solid var(--bad)}
article h3{margin:.7em 0 .2em;font-size:1.1em}
.why{background:var(--bad-ground);color:var(--bad);border-left:4px solid var(--bad);padding:.5em .8em;
  max-width:none}
.media{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,22em),1fr));gap:0 1.6em}
.media>div{min-width:0}
.media h4{margin:.8em 0 .2em;font-size:1em}
.pictures{display:grid;gap:3px;width:fit-content;max-width:100%;margin:.3em 0}
.beside{display:flex;flex-wrap:wrap;gap:0 1em;align-items:flex-start}
.plots figure{max-width:40em}
.pictures figure{margin:0;min-width:0}
.pictures img{display:block;width:100%;height:auto;background:var(--panel)}
.coarse{image-rendering:pixelated}
.pictures figcaption{font-size:.78em;color:var(--quiet);margin:0;text-align:center}
.tokens{display:flex;flex-wrap:wrap;gap:3px;margin:.5em 0;font-family:ui-monospace,monospace;font-size:.9em}
.tokens>*{display:inline-flex;flex-direction:column;align-items:center;border:1px solid var(--rule);
  border-radius:3px;padding:0 .35em;line-height:1.3;unicode-bidi:isolate;color:inherit;background:none;
  max-width:100%}
.tokens mark{background:var(--target);border-color:var(--target-rule);border-bottom-width:4px;font-weight:600}
.tokens a{background:var(--soft);border-color:var(--soft-rule);text-decoration:none}
.tokens .gap{border-style:dashed;justify-content:center;color:var(--quiet)}
sup,sub{font-size:.72em;color:var(--quiet);font-weight:400;vertical-align:baseline;line-height:1.25;
  font-variant-numeric:tabular-nums}
.options{display:flex;flex-wrap:wrap;gap:.3em 1.4em;align-items:center;margin:.6em 0}
body:has(#ids:not(:checked)) .tokens sub,body:has(#positions:not(:checked)) .tokens sup{display:none}
details{margin:.6em 0}
summary{cursor:pointer;color:var(--link)}
ul{padding-left:1.3em}
@media(max-width:600px){
  body{padding:0 .7em 3em}
  nav{margin:0 -.7em;padding:.5em .7em}
  article{padding:.1em .7em .7em}
  h1{font-size:1.4em}
  .tiles>div{flex-basis:40%}
}
@media print{
  nav,.options{display:none}
  article{break-inside:avoid}
}
"""
