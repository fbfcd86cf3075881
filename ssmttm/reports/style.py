"""The style sheet of `page`: modest, light and dark, readable on a phone."""

STYLE = """
:root { --paper: #fbfaf8; --card: #fff; --ink: #1f2328; --soft: #5d6570; --edge: #dfdcd6; --accent: #b5472e;
  --blue: #23679e;
  --green: #3b7a3f; --violet: #7a4fa3; color-scheme: light dark; }
@media (prefers-color-scheme: dark) { :root { --paper: #15171a; --card: #1d2024; --ink: #e6e4df; --soft: #a0a6ad;
  --edge: #33373d; --accent: #ee8a68; --blue: #74b3e6; --green: #84c587; --violet: #bd97e0; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 1.5rem 1rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: .5rem 0; } h2 { font-size: 1.15rem; margin: 0 0 .75rem; }
.lead { color: var(--soft); margin: 0 0 1.5rem; }
section { margin: 1.25rem 0; padding: 1.1rem; background: var(--card); border: 1px solid var(--edge);
  border-radius: 10px; }
.row { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 18rem), 1fr)); gap: 1.25rem; margin:
  .75rem 0; }
figure { margin: 0 0 .75rem; min-width: 0; } figcaption { font-weight: 600; margin-bottom: .4rem; }
img { display: block; width: 100%; border-radius: 6px; } audio { width: 100%; margin-top: .5rem; }
dl { display: flex; flex-wrap: wrap; gap: .35rem 1.1rem; margin: .5rem 0 0; font-size: .9rem; }
dl div { display: flex; gap: .4rem; } dt { color: var(--soft); } dd { margin: 0; font-variant-numeric: tabular-nums; }
.good { color: var(--green); } .bad { color: var(--accent); font-weight: 600; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: .9rem; font-variant-numeric:
  tabular-nums; }
th, td { text-align: left; padding: .35rem .8rem .35rem 0; border-bottom: 1px solid var(--edge); } th { color:
  var(--soft); }
pre { overflow-x: auto; padding: .6rem .8rem; border: 1px solid var(--edge); border-radius: 6px; font-size: .85rem; }
svg { width: 100%; height: auto; font-size: 12px; fill: var(--soft); } .grid { stroke: var(--edge); fill: none; }
polyline { fill: none; stroke-width: 2; stroke-linejoin: round; } text { stroke: none; }
.line0 { stroke: var(--accent); } .line1 { stroke: var(--blue); } .line2 { stroke: var(--green); } .line3 { stroke:
  var(--violet); }
.name0 { fill: var(--accent); } .name1 { fill: var(--blue); } .name2 { fill: var(--green); } .name3 { fill:
  var(--violet); }
.numbers { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.5rem, 1fr)); gap: 1rem; margin: 0; }
.numbers div { display: block; } .numbers dd { font-size: 1.6rem; font-weight: 600; line-height: 1.2; }
.bars { list-style: none; margin: .5rem 0; padding: 0; display: grid; gap: .45rem; font-size: .9rem; }
.bars li { display: grid; grid-template-columns: minmax(6rem, 12rem) 1fr minmax(5.5rem, auto); gap: .15rem .8rem;
  align-items: center; } .bars .value { text-align: right; font-variant-numeric: tabular-nums; }
.bars .track { height: .7rem; border-radius: 4px; background: var(--edge); overflow: hidden; }
.bars .track i { display: block; height: 100%; min-width: 2px; background: var(--blue); border-radius: 4px; }
.row .bars li { grid-template-columns: 1fr auto; }
.row .bars .track { grid-row: 2; grid-column: 1 / -1; height: .5rem; }
.bars small, .note { grid-column: 1 / -1; color: var(--soft); } .note { font-size: .9rem; margin: .25rem 0 .75rem; }
.bars bdi, figure { overflow-wrap: anywhere; } dl + .scroll, dl + details { margin-top: .6rem; }
.clip audio { margin: 0; } .clip p { margin: .3rem 0; }
.histogram { font-size: 16px; max-width: 34rem; } rect { fill: var(--blue); } h3 { font-size: 1rem; margin: 0 0 .3rem; }
* + h3 { margin-top: 1.2rem; } h2 + h3 { margin-top: 0; } section > :last-child { margin-bottom: 0; }
.clip { padding-bottom: .75rem; } .clip dt { flex: none; } a { color: var(--accent); }
summary { cursor: pointer; color: var(--soft); } td { vertical-align: top; }
@media (max-width: 640px) { svg { font-size: 18px; } .histogram { font-size: 26px; }
  .bars li { grid-template-columns: 1fr auto; } .bars .track { grid-row: 2; grid-column: 1 / -1; } }
"""
