"""The still parts of the report's page: frame, style and script."""

from __future__ import annotations

__all__ = ["PAGE", "SCRIPT", "STYLE"]

STYLE = """
:root{--bg:#f6f7f9;--panel:#fff;--text:#1c2128;--dim:#68727e;--line:#e3e7ec;--track:#eef1f4;--strong:#1c2128}
@media (prefers-color-scheme:dark){:root{--bg:#0e1116;--panel:#171b22;--text:#e4e8ee;--dim:#8d97a5;--line:#2a313b;
--track:#222932;--strong:#fff}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--text);font:14px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1180px;margin:0 auto;padding:32px 24px 56px}
header{display:flex;flex-wrap:wrap;align-items:flex-end;gap:12px 40px;margin-bottom:20px}
h1{margin:0;font-size:13px;font-weight:600;color:var(--dim);letter-spacing:.02em}
h1 b{display:block;font-size:44px;line-height:1.1;color:var(--strong);letter-spacing:-.02em;
font-variant-numeric:tabular-nums}
h2{margin:0 0 12px;font-size:15px}
.cards{display:flex;flex-wrap:wrap;gap:10px;margin-left:auto}
.card{background:var(--panel);border:1px solid var(--line);border-radius:10px;padding:8px 16px}
.card b{display:block;font-size:17px;font-variant-numeric:tabular-nums}
.card span,.dim{color:var(--dim)}
.card span{font-size:12px}
section{background:var(--panel);border:1px solid var(--line);border-radius:12px;padding:18px 20px;margin-bottom:16px}
.two{display:grid;grid-template-columns:3fr 2fr;gap:16px}
@media (max-width:820px){.two{grid-template-columns:1fr}}
.plot{position:relative}
svg{display:block;width:100%;height:auto;overflow:visible}
.area{fill:var(--c)}
.grid{stroke:var(--line);stroke-width:1;vector-effect:non-scaling-stroke}
text{font:12px system-ui,sans-serif;fill:var(--dim)}
text.tick{text-anchor:end;font-variant-numeric:tabular-nums}
text.phase{fill:#fff;font-weight:600;text-anchor:middle;font-size:11.5px}
text.peak{fill:var(--strong);font-weight:700;font-size:13px}
line.peak{stroke:var(--strong);stroke-dasharray:5 4;opacity:.55}
circle.peak{fill:var(--strong);stroke:var(--panel);stroke-width:1.5}
#cursor{stroke:var(--strong);opacity:.7}
#tip{position:absolute;top:34px;display:none;pointer-events:none;background:var(--panel);border:1px solid var(--line);
border-radius:8px;box-shadow:0 6px 24px rgba(0,0,0,.16);padding:8px 12px;font-size:12px;white-space:nowrap;z-index:2}
#tip table td{padding:1px 0}
#tip td.n{padding-left:14px}
table{border-collapse:collapse;width:100%}
td{padding:4px 0;vertical-align:middle}
tr+tr td{border-top:1px solid var(--line)}
#tip tr+tr td{border:0}
.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap;padding-left:16px}
.w{width:34%;padding-left:18px}
.m{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;font-size:12.5px;word-break:break-all}
.bar{display:flex;height:9px;border-radius:5px;background:var(--track);overflow:hidden}
.bar i{background:var(--c);height:100%}
.dot{display:inline-block;width:10px;height:10px;border-radius:3px;background:var(--c);margin-right:9px}
.head{display:flex;justify-content:space-between;align-items:baseline}
label{color:var(--dim);font-size:13px;cursor:pointer}
.scroll{max-height:520px;overflow:auto}
ul{margin:0;padding-left:18px;color:var(--dim)}
"""

SCRIPT = """
(function () {
  var data = JSON.parse(document.getElementById("data").textContent);
  var plot = document.getElementById("plot"), cursor = document.getElementById("cursor");
  var tip = document.getElementById("tip"), box = plot.parentNode, count = data.phases.length;
  function text(n) {
    var units = [["GiB", 1073741824], ["MiB", 1048576], ["KiB", 1024]];
    for (var i = 0; i < 3; i++) if (n >= units[i][1]) return (n / units[i][1]).toFixed(2) + " " + units[i][0];
    return n + " B";
  }
  function hide() { tip.style.display = "none"; cursor.setAttribute("visibility", "hidden"); }
  plot.addEventListener("mousemove", function (event) {
    var point = plot.createSVGPoint();
    point.x = event.clientX; point.y = event.clientY;
    var x = point.matrixTransform(plot.getScreenCTM().inverse()).x;
    var index = Math.floor(x / data.width * count);
    if (index < 0 || index >= count) { hide(); return; }
    var rows = "", total = 0;
    for (var i = data.categories.length - 1; i >= 0; i--) {
      var bytes = data.categories[i][2][index];
      total += bytes;
      if (bytes) rows += '<tr><td><i class="dot c-' + data.categories[i][0] + '"></i>' + data.categories[i][1] +
        '</td><td class="n">' + text(bytes) + "</td></tr>";
    }
    tip.innerHTML = "<b>" + text(total) + '</b> <span class="dim">' + data.phases[index] +
      "</span><table>" + rows + "</table>";
    var middle = (index + 0.5) * data.width / count;
    cursor.setAttribute("x1", middle); cursor.setAttribute("x2", middle);
    cursor.setAttribute("visibility", "visible");
    tip.style.display = "block";
    var left = event.clientX - box.getBoundingClientRect().left;
    tip.style.left = (left > box.clientWidth / 2 ? left - tip.offsetWidth - 16 : left + 16) + "px";
  });
  plot.addEventListener("mouseleave", hide);
  var toggle = document.getElementById("each");
  toggle.addEventListener("change", function () {
    document.getElementById("groups").hidden = toggle.checked;
    document.getElementById("modules").hidden = !toggle.checked;
  });
})();
"""

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>Memory: peak @@peak@@</title>
<style>@@style@@</style>
</head>
<body>
<main>
<header>
<h1>Peak memory of a training step<b>@@peak@@</b>@@subtitle@@</h1>
<div class="cards">@@cards@@</div>
</header>
<section>
<div class="head"><h2>Live bytes over the step</h2><span class="dim">allocations and frees, in order</span></div>
<div class="plot">@@plot@@<div id="tip"></div></div>
</section>
<div class="two">
<section><h2>At the peak, by category</h2><table>@@legend@@</table></section>
<section><h2>Highest, by phase</h2><table>@@phases@@</table></section>
</div>
<section>
<div class="head"><h2>At the peak, by module</h2>
<label><input type="checkbox" id="each"> each module by itself</label></div>
<div class="scroll"><table id="groups">@@groups@@</table><table id="modules" hidden>@@modules@@</table></div>
</section>
<section><h2>More</h2><ul>@@notes@@</ul></section>
</main>
<script type="application/json" id="data">@@data@@</script>
<script>@@script@@</script>
</body>
</html>
"""
