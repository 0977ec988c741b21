// Show times in the viewer's zone, with UTC on hover, and obey a few keys. Every page works without this.
"use strict";

for (const each of document.querySelectorAll("time")) {
  const at = new Date(each.dateTime);
  if (isNaN(at)) continue;
  each.title = each.textContent;
  const timeStyle = each.closest("table.list") ? "short" : "medium";
  each.textContent = new Intl.DateTimeFormat(undefined, { dateStyle: "medium", timeStyle }).format(at);
}

// A page that its user chose to refresh. Not while it is hidden, or while something is being typed.
const refresh = document.querySelector(".refresh");
if (refresh) {
  refresh.hidden = false;
  const seconds = Number(refresh.dataset.seconds);
  const isBusy = () => document.hidden || document.activeElement.matches("input:not([type=hidden]), textarea");
  if (seconds) setInterval(() => isBusy() || location.reload(), seconds * 1000);
}

document.addEventListener("keydown", (event) => {
  const isTyping = event.target.closest("input, textarea, select");
  if (isTyping || event.ctrlKey || event.metaKey || event.altKey) return;
  const links = [...document.querySelectorAll("table.list tbody td:first-child a")];
  const at = links.indexOf(document.activeElement);
  if (event.key === "/") {
    const filter = document.querySelector(".filter input");
    if (filter) {
      event.preventDefault();
      filter.focus();
    }
  } else if (event.key === "?") {
    document.querySelector("#shortcuts").showModal();
  } else if (event.key === "o") {
    links[at]?.click();
  } else if (event.key === "j") {
    links[Math.min(at + 1, links.length - 1)]?.focus();
  } else if (event.key === "k") {
    links[Math.max(at - 1, 0)]?.focus();
  }
});
