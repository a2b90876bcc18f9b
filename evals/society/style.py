"""The page's style sheet: light and dark, wide and narrow."""

STYLE = """
:root {
  color-scheme: light dark;
  --page: #fbfaf8; --card: #ffffff; --ink: #22252a; --soft: #666d76; --rule: #dcdfe3;
  --own: #f2b25c; --master: #d9730d; --repaired: #b3261e;
  --reused: #8fb8e8; --exact: #5f9ea0; --earlier: #c9cfd6;
  --dense: #a3abb5; --stored: #2f6fbd; --inside: #1c2733; --ribbon: #2f6fbd;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #15181c; --card: #1d2126; --ink: #e6e8eb; --soft: #9aa3ad; --rule: #343a42;
    --own: #c98a35; --master: #e8701a; --repaired: #ff5a4d;
    --reused: #3f6ea5; --exact: #3e7d80; --earlier: #4a525c;
    --dense: #6b7480; --stored: #6ba3e6; --inside: #f4f6f8; --ribbon: #6ba3e6;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif;
}
main { max-width: 1040px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: clamp(1.6rem, 4.5vw, 2.3rem); line-height: 1.15; margin: 0 0 .5rem; }
h2 { font-size: 1.25rem; margin: 3rem 0 .4rem; }
h3 { font-size: 1rem; margin: 1.6rem 0 .4rem; }
p { max-width: 46rem; margin: .4rem 0 .8rem; }
.soft, figcaption, footer { color: var(--soft); font-size: .9rem; }
figure { margin: 0 0 1rem; }
.scroll { overflow-x: auto; -webkit-overflow-scrolling: touch; }
.card {
  background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: 14px 16px;
}
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(176px, 1fr)); gap: 12px; }
.tiles { margin: 1.4rem 0; }
.tile b { display: block; font-size: 1.6rem; line-height: 1.25; }
.tile span { color: var(--soft); font-size: .85rem; display: block; line-height: 1.35; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); gap: 12px; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 18px; font-size: .88rem; padding: 0; }
.legend { list-style: none; margin: .6rem 0 1rem; }
.legend i { display: inline-block; width: 13px; height: 13px; border-radius: 3px; }
.legend i { margin-right: 6px; vertical-align: -1px; }
svg { display: block; width: 100%; height: auto; }
svg text { font-size: 12px; fill: var(--ink); }
svg .axis { fill: var(--soft); font-size: 10.5px; }
svg .value { font-size: 11px; font-variant-numeric: tabular-nums; }
svg .name { font-weight: 600; }
svg .inside { font-size: 10.5px; fill: var(--inside); }
svg .grid { stroke: var(--rule); stroke-width: 1; }
svg .cut { stroke: var(--card); stroke-width: 1; }
.ribbon { fill: var(--ribbon); fill-opacity: .13; stroke: var(--ribbon); stroke-opacity: .25; }
.ribbon:hover { fill-opacity: .45; }
.o-own { fill: var(--own); background: var(--own); }
.o-master { fill: var(--master); background: var(--master); }
.o-repaired { fill: var(--repaired); background: var(--repaired); }
.o-reused { fill: var(--reused); background: var(--reused); }
.o-exact { fill: var(--exact); background: var(--exact); }
.o-earlier { fill: var(--earlier); background: var(--earlier); }
.t-plan { fill: var(--repaired); background: var(--repaired); }
.t-prefill { fill: var(--master); background: var(--master); }
.t-decode { fill: var(--stored); background: var(--stored); }
.t-full, .dot-dense { fill: var(--dense); background: var(--dense); }
.dot-stored { fill: var(--stored); background: var(--stored); }
.line-dense, .line-stored { fill: none; stroke-width: 2.5; stroke: var(--dense); }
.line-stored { stroke: var(--stored); }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .8rem; }
th, td { text-align: right; padding: 5px 0 5px 12px; }
td { white-space: nowrap; }
th { vertical-align: bottom; line-height: 1.25; }
th { color: var(--soft); font-weight: 600; border-bottom: 1px solid var(--rule); }
tr:last-child td { border-top: 1px solid var(--rule); font-weight: 600; }
.facts td { text-align: left; font-weight: 400; border: 0; white-space: normal; }
.facts td:first-child { color: var(--soft); white-space: nowrap; vertical-align: top; }
.said { margin: 0 0 .55rem; max-width: none; }
.said b { margin-right: .4rem; }
.said small { color: var(--soft); margin-right: .4rem; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: .85rem; margin: .4rem 0; }
summary { cursor: pointer; }
"""
