// One question in a page of its own, as a notebook shows it.
(async () => {
  if (pack.supported) await explorer(JSON.parse(document.getElementById("data").textContent));
  document.getElementById("too-old").hidden = pack.supported;
  document.documentElement.dataset.ready = pack.supported ? "yes" : "no";
})();
