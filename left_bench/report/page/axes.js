// For each axis the cells that differ in it alone, beside each other.

function drawAxisSection(section) {
  const metrics = data.main.map(metricOf).filter(Boolean);
  for (const { axis, blocks } of data.by_axis) {
    section.append(
      el("h2", {}, `By ${say(axis)}`),
      el("p", { class: "hint" }, "The cells of a block differ in nothing else; small text compares with its reference."),
      el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": `Cells by ${say(axis)}` },
        el("table", { class: "plain by-axis" },
          el("thead", {}, el("tr", {}, ["cell", ...metrics.map((metric) => metric.heading)].map((name, n) => el("th", { scope: "col", class: n ? "number" : null }, name)))),
          blocks.map((block) => el("tbody", {}, block.rows.map((i, n) => axisRow(block, i, n, metrics)))))));
  }
  return data.by_axis.length > 0;
}

function axisRow(block, i, n, metrics) {
  const cells = metrics.map((metric) => {
    const against = block.against[metric.name]?.[n] ?? null;
    return el("td", { class: "number" }, isOk(i) ? numberText(metric, i) : "", against === null ? null : el("span", { class: "against" }, say(against)));
  });
  return el("tr", { class: i === block.reference ? "reference" : null },
    el("th", { scope: "row" }, say(data.labels[i]), i === block.reference ? el("small", {}, " reference") : null, isOk(i) ? null : el("span", { class: statusClass(i) }, ` ${say(data.status[i])}`)),
    cells);
}
