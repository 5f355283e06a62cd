"use strict";
// The page is whole without its scripts: they add filters, order, pages, a larger view, verdicts and themes.
const root = document.documentElement;
const byId = (id) => document.getElementById(id);
root.classList.remove("no-script");

// What is kept under a name in this browser. Some browsers give pages from files no storage.
function remembered(name, value) {
  try {
    if (value !== undefined) localStorage.setItem(name, value);
    return localStorage.getItem(name);
  } catch {
    return null;
  }
}

const prefersDark = matchMedia("(prefers-color-scheme: dark)");
const theme = () => root.dataset.theme ?? (prefersDark.matches ? "dark" : "light");
function nameSwitch() {
  byId("theme").textContent = theme() === "dark" ? "Light theme" : "Dark theme";
}
if (remembered("csflow-theme")) root.dataset.theme = remembered("csflow-theme");
prefersDark.addEventListener("change", nameSwitch);
byId("theme").addEventListener("click", () => {
  root.dataset.theme = theme() === "dark" ? "light" : "dark";
  remembered("csflow-theme", root.dataset.theme);
  nameSwitch();
});
nameSwitch();
