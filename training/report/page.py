"""The report's HTML, as a template in the code: a frozen program has no data files to look for."""

from __future__ import annotations

STYLE = """
:root { color-scheme: light dark;
  --page: #f6f6f3; --card: #ffffff; --ink: #16181d; --soft: #585d66; --faint: #868b94;
  --rule: #e4e4de; --c1: #2a78d6; --c2: #d9622b; --c3: #12936a; --c4: #b97f00; --c5: #6a58c9;
  --c6: #c4487f; --raw: #b4b8bf; --warn: #b3261e; --good: #0f7a55; }
@media (prefers-color-scheme: dark) { :root {
  --page: #131417; --card: #1b1d21; --ink: #eceef1; --soft: #aab0ba; --faint: #7e858f;
  --rule: #2d3036; --c1: #5a9ef0; --c2: #ee8552; --c3: #35b88c; --c4: #dba62e; --c5: #9a8cf0;
  --c6: #e27ba8; --raw: #5b616b; --warn: #ff8a80; --good: #4fc79b; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 28px 20px 60px; }
header { display: flex; flex-wrap: wrap; gap: 4px 16px; align-items: baseline; }
h1 { font-size: 26px; margin: 0; letter-spacing: -0.01em; overflow-wrap: anywhere; }
h2 { font-size: 19px; margin: 40px 0 12px; }
h3 { font-size: 15px; margin: 0; font-weight: 650; }
p { margin: 6px 0; } .soft { color: var(--soft); } .small { font-size: 13px; }
.state { color: var(--soft); } .state b { color: var(--good); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 1px;
  margin: 20px 0 22px; background: var(--rule); border: 1px solid var(--rule);
  border-radius: 10px; overflow: hidden; }
.tile { background: var(--card); padding: 13px 16px; min-width: 0; }
.tile .name { color: var(--soft); font-size: 13px; }
.tile .value { font-size: 23px; font-weight: 650; line-height: 1.25; white-space: nowrap; }
.tile .note { color: var(--faint); font-size: 12.5px; line-height: 1.35; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 470px), 1fr));
  gap: 16px; }
figure { margin: 0; background: var(--card); border: 1px solid var(--rule); border-radius: 10px;
  padding: 15px 18px 13px; min-width: 0; }
figure:last-child:nth-child(odd) { grid-column: 1 / -1; }
.head { display: flex; justify-content: space-between; gap: 12px; align-items: baseline; }
.unit { color: var(--faint); font-size: 12.5px; text-align: right; }
.legend { display: flex; flex-wrap: wrap; gap: 2px 16px; margin: 5px 0 9px; font-size: 13px;
  color: var(--soft); min-height: 21px; }
.legend b { color: var(--ink); font-weight: 600; font-variant-numeric: tabular-nums; }
.key { display: inline-block; width: 13px; height: 4px; border-radius: 2px; margin-right: 6px;
  vertical-align: middle; background: currentColor; }
.plot { position: relative; height: 210px; margin: 6px 8px 31px 48px; }
.plot svg { position: absolute; inset: 0; width: 100%; height: 100%; overflow: visible; }
.tick { position: absolute; color: var(--faint); font-size: 12px; line-height: 1;
  font-variant-numeric: tabular-nums; white-space: nowrap; }
.y { right: calc(100% + 8px); transform: translateY(50%); }
.x { top: calc(100% + 8px); transform: translateX(-50%); }
.reference { right: 0; transform: translateY(-3px); color: var(--soft); pointer-events: none;
  background: color-mix(in srgb, var(--card) 78%, transparent); padding: 1px 3px; }
figcaption { color: var(--soft); font-size: 13px; line-height: 1.45; }
path { vector-effect: non-scaling-stroke; }
.grid { stroke: var(--rule); stroke-width: 1; fill: none; }
.ref { stroke: var(--soft); stroke-width: 1.2; stroke-dasharray: 5 4; fill: none; }
.line { fill: none; stroke: currentColor; stroke-width: 2; stroke-linejoin: round;
  stroke-linecap: round; }
.line.dense { stroke-width: 1.3; } .line.raw { stroke-width: 1; }
.dot { fill: none; stroke: currentColor; stroke-width: 7; stroke-linecap: round; }
.area { fill: currentColor; fill-opacity: .82; stroke: var(--card); stroke-width: 1; }
.c1 { color: var(--c1); } .c2 { color: var(--c2); } .c3 { color: var(--c3); }
.c4 { color: var(--c4); } .c5 { color: var(--c5); } .c6 { color: var(--c6); }
.raw { color: var(--raw); }
.hover rect { fill: transparent; } .hover path { stroke: var(--ink); stroke-width: 1; opacity: 0;
  pointer-events: none; }
.hover g:hover path { opacity: .45; }
.scroll { overflow-x: auto; border: 1px solid var(--rule); border-radius: 10px;
  background: var(--card); }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th, td { text-align: left; padding: 8px 16px; border-bottom: 1px solid var(--rule);
  white-space: nowrap; }
tr:last-child td { border-bottom: 0; } th { color: var(--soft); font-weight: 550; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
.warn { color: var(--warn); } .good { color: var(--good); }
.samples { display: grid; gap: 10px; }
.sample { display: grid; grid-template-columns: 92px 1fr; gap: 14px; background: var(--card);
  border: 1px solid var(--rule); border-radius: 10px; padding: 12px 16px; }
.sample .step { color: var(--soft); font-size: 13px; font-variant-numeric: tabular-nums; }
.sample blockquote { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere;
  font: 14px/1.55 ui-serif, Georgia, "Times New Roman", serif; }
dl { display: grid; grid-template-columns: minmax(120px, max-content) 1fr; gap: 7px 20px;
  margin: 0; } dt { font-weight: 600; } dd { margin: 0; color: var(--soft); }
details { margin-top: 10px; } summary { cursor: pointer; color: var(--soft); }
pre { overflow-x: auto; background: var(--card); border: 1px solid var(--rule);
  border-radius: 10px; padding: 14px 16px; font-size: 12.5px; line-height: 1.45; }
@media (max-width: 560px) { main { padding: 18px 12px 40px; } .sample { grid-template-columns: 1fr;
  gap: 2px; } dl { grid-template-columns: 1fr; gap: 2px; } dd { margin-bottom: 9px; }
  .tile .value { font-size: 20px; } .plot { height: 180px; } figure { padding: 13px 12px 11px; }
  .tiles { grid-template-columns: 1fr 1fr; } th, td { padding: 7px 10px; } }
@media print { body { background: none; } figure, .sample { break-inside: avoid; } }
"""

TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>{{ style }}</style>
</head>
<body>
<main>
<header><h1>{{ title }}</h1><span class="state"><b>{{ state }}</b>{{ state_note }}</span></header>
<section class="tiles" aria-label="Run facts">
{%- for tile in tiles %}
<div class="tile"><div class="name">{{ tile.name }}</div><div class="value">{{ tile.value }}</div>
<div class="note">{{ tile.note }}</div></div>
{%- endfor %}
</section>
{%- if not charts %}
<p class="soft">No training step has been recorded yet.</p>
{%- endif %}
<section class="charts">
{%- for chart in charts %}
<figure>
<div class="head"><h3>{{ chart.title }}</h3><span class="unit">{{ chart.unit }}</span></div>
<div class="legend">
{%- for entry in chart.legend %}
<span><i class="key {{ entry.style }}"></i>{{ entry.label }} <b>{{ entry.value }}</b></span>
{%- endfor %}
</div>
<div class="plot">{{ chart.svg }}
{%- for tick in chart.y_ticks %}
<span class="tick y" style="bottom:{{ tick.percent }}%">{{ tick.label }}</span>
{%- endfor %}
{%- for tick in chart.x_ticks %}
<span class="tick x" style="left:{{ tick.percent }}%">{{ tick.label }}</span>
{%- endfor %}
{%- for tick in chart.references %}
<span class="tick reference" style="bottom:{{ tick.percent }}%">{{ tick.label }}</span>
{%- endfor %}
</div>
<figcaption>{{ chart.caption }}</figcaption>
</figure>
{%- endfor %}
</section>
{%- if samples %}
<h2>What the model writes</h2>
<section class="samples">
{%- for sample in samples %}
<div class="sample"><div class="step">step {{ sample.step }}</div>
<blockquote>{{ sample.text }}</blockquote></div>
{%- endfor %}
</section>
{%- endif %}
{%- if features %}
<h2>Features</h2>
<div class="scroll"><table>
<tr><th>feature</th><th>switched on</th><th class="number">times it acted</th>
<th class="number">milliseconds in all</th></tr>
{%- for feature in features %}
<tr><td>{{ feature.name }}</td><td>{{ "yes" if feature.enabled else "no" }}</td>
<td class="number">{% if feature.idle %}<span class="warn">0, no effect yet</span>
{%- else %}{{ feature.calls }}{% endif %}</td><td class="number">{{ feature.ms }}</td></tr>
{%- endfor %}
</table></div>
{%- endif %}
{%- if trials %}
<h2>Research journal</h2>
<section class="samples">
{%- for trial in trials %}
<div class="sample"><div class="step">cycle {{ trial.cycle }}, step {{ trial.step }}</div>
<div><p>{{ trial.hypothesis }}</p>
<p class="small soft">Written before: {{ trial.metric }} {{ trial.threshold }}</p>
{%- if trial.result %}
<p class="small soft">Came out: {{ trial.result }}</p>
{%- endif %}
<p><b>{{ trial.decision }}</b></p></div></div>
{%- endfor %}
</section>
{%- endif %}
<h2>How to read this page</h2>
<dl>
<dt>Training step</dt><dd>The model reads a batch of text, predicts every next token, and all its
weights move a little. All curves run over steps; hover over one to read its values.</dd>
<dt>Loss</dt><dd>How surprised the model is by the next token, in nats: 0 is certainty, guessing
blindly costs the logarithm of the vocabulary size. Lower is better; single steps are noisy, so
look at the average.</dd>
<dt>Bits per byte</dt><dd>The same surprise on text that was never trained on, per byte of text
instead of per token. It can be compared with other models, tokenizers and even compressors: a
model with 1.5 bits per byte would compress the text to 1.5 / 8 of its size.</dd>
<dt>Learning well</dt><dd>Held-out loss falls together with training loss. If training loss falls
and held-out loss rises, the model learns its text by heart: give it more text. If both stand
still from the start, try another learning rate.</dd>
<dt>Gradient norm</dt><dd>How hard the loss pulls on the weights. Rare spikes are normal; growth
over many steps means the learning rate is too high.</dd>
<dt>Features</dt><dd>Optional parts count how often they really changed something. One that is
switched on and never acted had no part in the result.</dd>
</dl>
<h2>The run</h2>
<dl>
{%- for fact in facts %}
<dt>{{ fact.name }}</dt><dd>{{ fact.value }}</dd>
{%- endfor %}
</dl>
{%- if settings %}
<details><summary>All settings (config.json)</summary><pre>{{ settings }}</pre></details>
{%- endif %}
</main>
</body>
</html>
"""
