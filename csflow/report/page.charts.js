
// Charts: bars, folders and places of the heat map choose the images that they stand for.
const TESTS = {
  score: ({ low, high }) => (card) => Number(card.dataset.score) >= Number(low) && Number(card.dataset.score) < Number(high),
  day: ({ value }) => (card) => card.dataset.day === value,
  run: ({ value }) => (card) => card.dataset.run === value,
  folder: ({ value }) => (card) => card.dataset.folder === value,
};
// Rows and columns by which a key moves.
const STEPS = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
const isPress = (event) => event.key === "Enter" || event.key === " ";

function startCharts(gallery) {
  for (const element of document.querySelectorAll("[data-filter]")) {
    const test = TESTS[element.dataset.filter](element.dataset);
    const images = gallery.cards.filter(test).length;
    if (images) makeButton(element, images, () => gallery.choose(element.dataset.filter, element.dataset.label, test));
  }
  for (const chart of document.querySelectorAll(".plot svg")) makeGroup(chart);
  if (byId("cells")) startCells(gallery, byId("cells"));
}

function makeButton(element, images, act) {
  element.classList.add("chooses");
  element.setAttribute("role", "button");
  element.tabIndex = 0;
  const label = `${element.dataset.label}: show ${count(images, "image")}`;
  element.ariaLabel = label;
  const title = element.querySelector("title");
  if (title) title.textContent += `; click to show the ${count(images, "image")} of them that this page has`;
  element.addEventListener("click", act);
  element.addEventListener("keydown", (event) => {
    if (!isPress(event)) return;
    event.preventDefault();
    act();
  });
}

// Bars are one stop of the tab key, and arrow keys go from one to the next.
function makeGroup(chart) {
  const bars = [...chart.querySelectorAll(".chooses")];
  if (!bars.length) return;
  chart.setAttribute("role", "group"); // what an image holds is hidden from screen readers
  bars.forEach((bar, i) => (bar.tabIndex = i ? -1 : 0));
  chart.addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    const next = by && bars[bars.indexOf(event.target) + by];
    if (by) event.preventDefault();
    if (!next) return;
    event.target.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  });
}

// The heat map: pointer and arrow keys choose a place, a click or Enter shows the images that are hot there.
function startCells(gallery, cells) {
  const { rows, columns, flagged } = Object.fromEntries(Object.entries(cells.dataset).map(([k, v]) => [k, Number(v)]));
  const hot = cells.dataset.hot.split(" ").map(Number);
  const bits = new Map(gallery.cards.map((card) => [card, atob(card.dataset.hot)]));
  const isHot = (card, cell) => (bits.get(card).charCodeAt(cell >> 3) & (128 >> (cell & 7))) !== 0;
  const cursor = Object.assign(document.createElement("span"), { className: "cursor", hidden: true });
  cells.append(cursor);
  cells.tabIndex = 0;
  cells.setAttribute("role", "group");
  cells.ariaLabel = "Heat map. Arrow keys choose a place, Enter shows the images that are hot there.";
  let at = hot.indexOf(Math.max(...hot));

  const label = () => `row ${Math.floor(at / columns) + 1}, column ${(at % columns) + 1}`;
  function move(row, column) {
    at = Math.min(Math.max(row, 0), rows - 1) * columns + Math.min(Math.max(column, 0), columns - 1);
    cursor.hidden = false;
    cursor.style.cssText = `width: ${100 / columns}%; height: ${100 / rows}%; left: ${((at % columns) * 100) / columns}%; top: ${(Math.floor(at / columns) * 100) / rows}%`;
    const here = gallery.cards.filter((card) => isHot(card, at)).length;
    byId("cell").textContent = `R${label().slice(1)}: hot in ${hot[at]} of ${flagged} flagged images, ${here} on this page`;
  }
  function choose() {
    const cell = at;
    if (gallery.cards.some((card) => isHot(card, cell))) {
      gallery.choose("place", `hot in ${label()}`, (card) => isHot(card, cell));
    }
  }
  const point = (event) => {
    const box = cells.getBoundingClientRect();
    move(
      Math.floor(((event.clientY - box.top) / box.height) * rows),
      Math.floor(((event.clientX - box.left) / box.width) * columns),
    );
  };
  cells.addEventListener("pointermove", point);
  cells.addEventListener("click", (event) => {
    point(event);
    choose();
  });
  cells.addEventListener("focus", () => move(Math.floor(at / columns), at % columns));
  cells.addEventListener("keydown", (event) => {
    const [down, across] = STEPS[event.key] ?? [];
    if (down !== undefined) move(Math.floor(at / columns) + down, (at % columns) + across);
    else if (isPress(event)) choose();
    else return;
    event.preventDefault();
  });
}
