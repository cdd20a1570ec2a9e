// A page of results: every figure is drawn at once.
for (const [at, figure] of JSON.parse(document.getElementById("data").textContent).entries())
  Plotly.newPlot(`plot-${at}`, figure.data, figure.layout, { responsive: true, displaylogo: false });
document.documentElement.dataset.ready = "yes";
