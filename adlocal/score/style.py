"""Style and script of the page that `adlocal score --html` writes. The page's policy lets nothing else run."""

from __future__ import annotations

#: Shades on either side of zero.
LEVELS = 16

_Colour = tuple[int, int, int]
# From the colour of the page at zero to what stays readable below the text: blue and orange, told apart in every common
# form of colour blindness. Black text on the light pair and white text on the dark pair have a contrast above 4.5.
_LIGHT: tuple[_Colour, _Colour, _Colour] = (255, 255, 255), (86, 160, 228), (246, 138, 60)
_DARK: tuple[_Colour, _Colour, _Colour] = (21, 23, 26), (30, 100, 180), (166, 76, 14)


def _shades(colours: tuple[_Colour, _Colour, _Colour]) -> str:
    zero, negative, positive = colours
    return "\n".join(
        f".{sign}{level}{{background:{_mixed(zero, end, level / LEVELS)}}}"
        for sign, end in (("n", negative), ("p", positive))
        for level in range(1, LEVELS + 1)
    )


def _mixed(a: _Colour, b: _Colour, share: float) -> str:
    return "#" + "".join(f"{round(x + (y - x) * share):02x}" for x, y in zip(a, b, strict=True))


STYLE = f"""
:root {{ color-scheme: light dark; --page: #fff; --ink: #16181b; --dim: #636a73; --line: #d8dce1;
  --low: #2f7fc9; --high: #d9691a; }}
body {{ margin: 0 auto; max-width: 70rem; padding: 1rem 1.25rem 4rem; background: var(--page); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; }}
h1 {{ font-size: 1.4rem; margin: .5rem 0; overflow-wrap: anywhere; }}
b {{ font-weight: inherit; border-radius: 2px; forced-color-adjust: none; print-color-adjust: exact; }}
i {{ font-style: inherit; color: var(--dim); }}
s {{ text-decoration: none; font-size: .7em; border: 1px solid; border-radius: 2px; padding: 0 .15em; opacity: .75; }}
u {{ text-decoration: none; }}
u::before {{ content: "↵"; opacity: .55; }}
.legend {{ max-width: 44rem; }}
.legend p {{ color: var(--dim); font-size: .875rem; margin: .5rem 0; }}
.ends {{ display: flex; justify-content: space-between; font-size: .875rem; font-variant-numeric: tabular-nums; }}
.scale {{ display: flex; height: 1.25rem; border: 1px solid var(--line); border-radius: 4px; overflow: hidden; }}
.scale b {{ flex: 1; border-radius: 0; }}
.charts {{ display: flex; flex-wrap: wrap; gap: 1rem 2rem; margin: 1rem 0; }}
figure {{ flex: 1 1 22rem; margin: 0; }}
figcaption {{ font-size: .875rem; }}
svg {{ width: 100%; height: auto; display: block; }}
svg text {{ font-size: 11px; fill: var(--dim); font-variant-numeric: tabular-nums; }}
svg .axis {{ stroke: var(--line); }}
svg .mean {{ stroke: var(--ink); stroke-dasharray: 4 3; }}
svg .low {{ fill: var(--low); }}
svg .high {{ fill: var(--high); }}
.table {{ max-height: 26rem; overflow: auto; border: 1px solid var(--line); border-radius: 4px; margin: 1rem 0; }}
table {{ border-collapse: collapse; width: 100%; font-size: .875rem; font-variant-numeric: tabular-nums; }}
th {{ position: sticky; top: 0; background: var(--page); box-shadow: inset 0 -1px var(--line); text-align: left; }}
th, td {{ padding: .25rem .6rem; white-space: nowrap; }}
th.n, td:nth-child(2), td:nth-child(3), td:nth-child(4) {{ text-align: right; }}
tbody tr:nth-child(even) {{ background: color-mix(in srgb, var(--line) 30%, transparent); }}
td b {{ font-family: ui-monospace, monospace; white-space: pre; color: var(--ink); padding: 0 .15em; }}
th button {{ all: unset; cursor: pointer; }}
th button:focus-visible {{ outline: 2px solid; }}
th button::after {{ content: " ↕"; opacity: .4; }}
th[aria-sort=ascending] button::after {{ content: " ↑"; opacity: 1; }}
th[aria-sort=descending] button::after {{ content: " ↓"; opacity: 1; }}
a {{ color: inherit; }}
details {{ border-top: 1px solid var(--line); }}
summary {{ cursor: pointer; padding: .4rem 0; font-variant-numeric: tabular-nums; }}
summary span {{ color: var(--dim); font-size: .875rem; margin-left: .5rem; }}
details > div {{ font: .9rem/1.75 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere;
  unicode-bidi: isolate; padding-bottom: 1rem; scroll-margin-top: 3rem; }}
details b {{ padding: .1em 0; }}
{_shades(_LIGHT)}
@media (prefers-color-scheme: dark) {{
:root {{ --page: #15171a; --ink: #eef0f2; --dim: #9aa3ad; --line: #363b42; --low: #5aa2e6; --high: #ec8a3f; }}
{_shades(_DARK)}
}}
"""

SCRIPT = """
"use strict";
const body = document.querySelector("tbody");
[...body.rows].forEach((row, i) => { row.place = i; });
const sortable = document.querySelectorAll("th.sort");
sortable.forEach((head, column) => {
  const button = document.createElement("button");
  button.textContent = head.textContent;
  head.replaceChildren(button);
  const key = row => column ? parseFloat(row.cells[column].textContent) : row.place;
  button.addEventListener("click", () => {
    const before = head.getAttribute("aria-sort");
    const down = before ? before === "ascending" : column > 0;
    sortable.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", down ? "descending" : "ascending");
    body.append(...[...body.rows].sort((a, b) => (down ? key(b) - key(a) : key(a) - key(b)) || a.place - b.place));
  });
});
"""
