"""The look of the report's page."""

CSS = """
:root {
  color-scheme: light dark;
  --page: #f6f6f4; --card: #ffffff; --ink: #1b1b1a; --quiet: #5f5e5a; --hair: #e4e3de; --track: #efeeea;
  --blue: #2a78d6; --green: #16803c; --red: #c93636; --grey: #a5a49d; --amber: #9a6700;
  --green-wash: #e6f4ea; --red-wash: #fbe9e9; --grey-wash: #eeede9; --amber-wash: #fdf3d8;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #171716; --card: #20201f; --ink: #f3f2ee; --quiet: #b4b3ab; --hair: #373633; --track: #2c2b29;
    --blue: #5a9ff0; --green: #54c67c; --red: #f07c7c; --grey: #7c7b75; --amber: #e3b341;
    --green-wash: #17331f; --red-wash: #3d1e1e; --grey-wash: #302f2d; --amber-wash: #3a2f12;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
main { max-width: 1120px; margin: 0 auto; padding: 40px 24px 64px; }
h1 { font-size: 34px; line-height: 1.15; letter-spacing: -0.02em; margin: 0 0 6px; }
h2 { font-size: 21px; letter-spacing: -0.01em; margin: 44px 0 4px; }
h3 { font-size: 17px; margin: 0; overflow-wrap: anywhere; }
h4 { font-size: 13px; font-weight: 600; margin: 0 0 6px; }
p { margin: 0; }
.eyebrow { color: var(--quiet); font-size: 13px; letter-spacing: .06em; text-transform: uppercase; margin-bottom: 6px; }
.quiet, figcaption, .note { color: var(--quiet); font-size: 13px; }
.lead { color: var(--quiet); margin-bottom: 14px; max-width: 76ch; }
a { color: var(--blue); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(190px, 1fr)); gap: 14px; margin-top: 26px; }
.tile, .card { background: var(--card); border: 1px solid var(--hair); border-radius: 10px; }
.tile { padding: 14px 18px 16px; }
.tile b { display: block; font-size: 30px; line-height: 1.25; font-weight: 650; letter-spacing: -0.02em; }
.card { padding: 20px 22px; margin-top: 14px; }
.card > header { display: flex; flex-wrap: wrap; align-items: baseline; gap: 4px 12px; margin-bottom: 14px; }
.pair { display: grid; grid-template-columns: minmax(0, 5fr) minmax(0, 6fr); gap: 24px 32px; align-items: start; }
.pair.even { grid-template-columns: minmax(0, 1fr) minmax(0, 1fr); }
.pair > * { min-width: 0; }
@media (max-width: 800px) { .pair, .pair.even { grid-template-columns: minmax(0, 1fr); } }
figure { margin: 0; }
figcaption { margin-top: 6px; overflow-wrap: anywhere; }
figure img {
  display: block; width: 100%; height: auto; max-width: 460px; border-radius: 6px; border: 1px solid var(--hair);
  image-rendering: pixelated; background: #000;
}
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th { text-align: left; font-weight: 600; font-size: 12.5px; color: var(--quiet); white-space: nowrap; }
th, td { padding: 6px 14px 6px 0; border-bottom: 1px solid var(--hair); vertical-align: baseline; }
tr:last-child > td { border-bottom: 0; }
th:last-child, td:last-child { padding-right: 0; }
.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.wide { min-width: 130px; width: 40%; }
.mark { color: var(--green); }
.stack > * + * { margin-top: 16px; }
.stack th, .stack td { padding-right: 12px; }
.stack .change { font-size: 12px; }
.trio { display: grid; grid-template-columns: repeat(auto-fit, minmax(300px, 1fr)); gap: 0 14px; }
.trio .wide { display: none; }
code {
  font: 13px/1.45 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; overflow-wrap: anywhere;
  unicode-bidi: isolate;
}
td code { overflow-wrap: break-word; }
.change { display: block; }
.pill { font-size: 12.5px; font-weight: 600; padding: 1px 10px; border-radius: 99px; white-space: nowrap; }
.good { color: var(--green); background: var(--green-wash); }
.bad { color: var(--red); background: var(--red-wash); }
.open { color: var(--quiet); background: var(--grey-wash); }
.notice { margin-top: 18px; padding: 10px 16px; border-radius: 8px; }
.notice { color: var(--amber); background: var(--amber-wash); }
.bar { display: flex; gap: 2px; height: 12px; border-radius: 4px; overflow: hidden; background: var(--track); }
.bar i { display: block; min-width: 2px; background: var(--blue); }
.bar i.failed, .key i.failed { background: var(--red); }
.bar i.no_matching_series, .key i.no_matching_series { background: var(--grey); }
.key { display: flex; flex-wrap: wrap; gap: 4px 18px; color: var(--quiet); font-size: 13px; margin-bottom: 8px; }
.key i { display: inline-block; width: 10px; height: 10px; margin-right: 7px; border-radius: 3px; }
.key i { background: var(--blue); }
.key i.ring { border-radius: 99px; background: var(--card); border: 2px solid var(--blue); }
.key i.round { border-radius: 99px; }
details { margin-top: 14px; }
summary { cursor: pointer; font-weight: 600; font-size: 14px; }
.config { columns: 2; column-gap: 32px; margin: 8px 0 0; }
.config div {
  break-inside: avoid; display: flex; justify-content: space-between; gap: 16px; padding: 3px 0;
  border-bottom: 1px solid var(--hair);
}
@media (max-width: 800px) { .config { columns: 1; } }
dl, dt, dd { margin: 0; }
svg { display: block; width: 100%; height: auto; overflow: visible; }
svg text { fill: var(--ink); font-size: 12px; }
svg .tick, svg .axis { fill: var(--quiet); font-size: 11.5px; }
svg .value { font-weight: 650; font-size: 13px; }
svg .grid { stroke: var(--hair); stroke-width: 1; }
svg .reference { stroke: var(--quiet); stroke-width: 1.5; stroke-dasharray: 5 4; }
svg .line { fill: none; stroke: var(--blue); stroke-width: 2; stroke-linejoin: round; stroke-linecap: round; }
svg .range { stroke: var(--blue); stroke-width: 2; opacity: .55; }
svg .dot { fill: var(--blue); stroke: var(--card); stroke-width: 2; }
svg .dot.approved { fill: var(--green); }
svg .dot.hollow { fill: var(--card); stroke: var(--blue); }
footer { margin-top: 48px; padding-top: 18px; border-top: 1px solid var(--hair); }
footer li { margin-bottom: 4px; max-width: 92ch; }
footer ul { padding-left: 18px; margin: 8px 0; }
@media print {
  body { background: none; }
  main { max-width: none; padding: 0; }
  .card, .tile { break-inside: avoid; }
  * { print-color-adjust: exact; }
}
"""
