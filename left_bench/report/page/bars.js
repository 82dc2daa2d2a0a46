// Bars of memory, for the cells that pass the filters, in the order of the table.

const MAX_BARS = 40;
const PART_COLOURS = new Map([["weights", "c0"], ["adapter", "c3"], ["adapter frozen", "c4"], ["gradients", "c2"], ["optimizer", "c1"], ["activations", "c5"], ["workspace", "rest"], ["activations and workspace", "rest"]]);

const partColour = (n) => PART_COLOURS.get(say(data.parts[n])) ?? ["c4", "c5", "c6"][n % 3];

function drawMemorySection(section) {
  if (!data.memory.some(Boolean)) return;
  section.append(
    el("h2", {}, "What the memory peak is made of"),
    el("ul", { class: "legend", "aria-label": "Legend, in the order of the bars" },
      data.parts.map((part, n) => el("li", {}, svg("svg", { viewBox: "0 0 18 18", "aria-hidden": "true" }, svg("path", { d: "M2,2H16V16H2Z", class: partColour(n) })), say(part)))),
    el("div", { class: "chart" }, el("div", { class: "bars", id: "bars", role: "list" })),
    el("p", { class: "hint", id: "bars-note" }),
  );
  plotRedraws.push(drawMemory);
}

function drawMemory() {
  const rows = view.filter((i) => data.memory[i]);
  const drawn = rows.slice(0, MAX_BARS);
  const largest = Math.max(...drawn.map((i) => data.memory[i].at(-1)[0]));
  byId("bars").replaceChildren(...drawn.flatMap((i) => {
    const sizes = data.memory[i];
    const told = data.parts.map((part, n) => [say(part), sizes[n][0], say(sizes[n][1]), partColour(n)]).filter(([, size]) => size > 0);
    return [
      el("span", { class: "name", "aria-hidden": "true" }, say(data.labels[i])),
      el("span", { class: "bar", role: "listitem", "aria-label": `${say(data.labels[i])}: ${say(sizes.at(-1)[1])}, of which ${told.map(([part, , text]) => `${part} ${text}`).join(", ")}` },
        told.map(([part, size, text, colour]) => {
          const piece = el("span", { class: colour, title: `${part}: ${text}` });
          piece.style.width = `calc(${(100 * size) / largest}% - 1px)`;
          return piece;
        })),
      el("span", { "aria-hidden": "true" }, say(sizes.at(-1)[1])),
    ];
  }));
  byId("bars-note").textContent = [
    drawn.length ? "The bars follow the table's order and filters." : "No cell that passes the filters tells its parts.",
    drawn.length < rows.length ? `The first ${drawn.length} of ${rows.length.toLocaleString("en")} are drawn.` : "",
  ].filter(Boolean).join(" ");
}
