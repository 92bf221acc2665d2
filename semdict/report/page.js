// Draws the charts in the colours of the page, and sorts tables by a click on a heading.
"use strict";
(() => {
  const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
  const axis = () => ({ gridcolor: colour("--line"), linecolor: colour("--line"), zeroline: false, automargin: true });

  function draw(plot) {
    const figure = JSON.parse(document.getElementById(plot.dataset.figure).textContent);
    const layout = {
      height: 290, margin: { l: 56, r: 12, t: 12, b: 40 }, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: "system-ui, 'DejaVu Sans', sans-serif", size: 12, color: colour("--ink") },
      legend: { orientation: "h", y: -0.28, yanchor: "top" }, hovermode: "closest",
      ...figure.layout, xaxis: { ...axis(), ...figure.layout.xaxis }, yaxis: { ...axis(), ...figure.layout.yaxis },
    };
    window.Plotly.newPlot(plot, figure.data, layout, { responsive: true, displaylogo: false, displayModeBar: false });
  }

  function sort(heading) {
    const table = heading.closest("table"), body = table.tBodies[0], column = heading.cellIndex;
    const down = heading.getAttribute("aria-sort") !== "descending";
    for (const other of table.tHead.rows[0].cells) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", down ? "descending" : "ascending");
    const value = (row) => row.cells[column].dataset.sort;
    const text = (row) => row.cells[column].textContent;
    const rows = [...body.rows].sort((a, b) => {
      if (value(a) === undefined && value(b) === undefined) return (down ? -1 : 1) * text(a).localeCompare(text(b));
      if (value(a) === undefined) return 1; // rows without a value stay at the end
      if (value(b) === undefined) return -1;
      return (down ? -1 : 1) * (Number(value(a)) - Number(value(b)));
    });
    body.append(...rows);
  }

  const plots = document.querySelectorAll(".plot");
  if (window.Plotly) plots.forEach(draw);
  for (const button of document.querySelectorAll("table.sortable thead button")) {
    button.addEventListener("click", () => sort(button.closest("th")));
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => window.Plotly && plots.forEach(draw));
})();
