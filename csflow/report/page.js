
// Start.
const isForSomethingElse = (event, taking = "input, select, textarea") =>
  event.defaultPrevented || event.altKey || event.ctrlKey || event.metaKey || event.target.matches(taking);

if (byId("gallery")) {
  const gallery = new Gallery(byId("gallery"));
  startVerdicts(gallery);
  startCharts(gallery);
  addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!by || isForSomethingElse(event)) return;
    event.preventDefault();
    gallery.step(by);
  });
}
