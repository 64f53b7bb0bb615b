"""What the page looks like, and the three lines that let its figures be saved."""

STYLE = """
:root { color-scheme: light dark; --paper: #ffffff; --text: #1c2128; --faint: #8b949e; --line: #d0d7de;
  --ours: #e7f1ff; --ahead: #116329; --behind: #b35900; --wrong: #d1242f; }
@media (prefers-color-scheme: dark) { :root { --paper: #14181d; --text: #e3e8ee; --faint: #8b949e; --line: #383f48;
  --ours: #10294d; --ahead: #56d364; --behind: #f0a35e; --wrong: #ff7b72; } }
body { background: var(--paper); color: var(--text); font: 16px/1.5 system-ui, sans-serif; margin: 0 auto;
  max-width: 82rem; padding: 1rem; }
h1 { font-size: 1.5rem; line-height: 1.2; } h2 { font-size: 1.2rem; margin-top: 2rem; } h3 { margin-bottom: 0; }
h3 + p { color: var(--faint); margin: 0; }
p { max-width: 48rem; } a { color: inherit; }
dl { display: grid; gap: .15rem 1rem; grid-template-columns: max-content 1fr; }
dt { color: var(--faint); } dd { margin: 0; overflow-wrap: anywhere; }
.wide { overflow-x: auto; } svg { display: block; height: auto; width: 100%; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; white-space: nowrap; }
th, td { border-bottom: 1px solid var(--line); padding: .25rem .6rem; text-align: right; }
th[scope=row], tr > :first-child { background: var(--paper); left: 0; position: sticky; text-align: left; }
th { font-weight: 600; } td small { color: var(--faint); display: block; }
.ours { background: var(--ours); font-weight: 600; } .ours small { font-weight: 400; }
.ahead { color: var(--ahead); } .behind { color: var(--behind); }
td.wrong { color: var(--wrong); text-align: left; white-space: normal; }
@media (max-width: 40rem) { dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: .4rem; } }
"""

DOWNLOAD = """
const figures = document.getElementById("figures").textContent;
document.getElementById("download").href = URL.createObjectURL(new Blob([figures], {type: "application/json"}));
"""
