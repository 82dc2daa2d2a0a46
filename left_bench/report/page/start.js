// The page as it opens.

function whenResized(node, draw) {
  let before = node.clientWidth;
  new ResizeObserver(() => {
    if (node.clientWidth === before) return;
    before = node.clientWidth;
    draw();
  }).observe(node);
}

function drawTheme() {
  const button = byId("theme");
  const names = { "": "auto", light: "light", dark: "dark" };
  const order = Object.keys(names);
  const show = (theme) => {
    if (theme) document.documentElement.dataset.theme = theme;
    else delete document.documentElement.dataset.theme;
    button.textContent = `Theme: ${names[theme]}`;
  };
  const keep = (theme) => {
    try {
      if (theme === undefined) return localStorage.getItem("left_bench_theme") ?? "";
      localStorage.setItem("left_bench_theme", theme);
    } catch {
      // a browser that keeps nothing for this page: the choice lasts as long as the page is open
    }
    return "";
  };
  let theme = Object.hasOwn(names, keep()) ? keep() : "";
  show(theme);
  button.addEventListener("click", () => {
    theme = order[(order.indexOf(theme) + 1) % order.length];
    keep(theme);
    show(theme);
  });
  button.hidden = false;
}

for (const metric of data.metrics) {
  metric.bestRows = new Set(metric.best);
  metric.unresolvedRows = new Set(metric.unresolved ?? []);
}
drawTheme();
readAddress();
drawControls();
drawHead();
redraws.push(drawBody);
byId("command").closest("pre").after(copyButton(byId("command").textContent, "Copy"));
const plots = byId("plots");
plots.hidden = false;
view = passing();
const answer = byId("answer");
answer.hidden = !drawScatterControls(answer);
byId("by-axis").hidden = !drawAxisSection(byId("by-axis"));
drawAlongSection(plots);
drawMemorySection(plots);
drawLossSection(plots);
drawRatesSection(plots);
const tip = byId("tip");
tip.addEventListener("pointerleave", hideTipSoon);
tip.addEventListener("focusout", hideTipSoon);
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") hideTip();
});
byId("detail").addEventListener("click", (event) => {
  if (event.target === byId("detail")) byId("detail").close(); // the backdrop
});
changed();
viewIsKnown = true;
window.addEventListener("hashchange", () => {
  // an address pasted into the same tab: begin anew from it; a link within the page has none
  if (location.hash.includes("=")) location.reload();
});
