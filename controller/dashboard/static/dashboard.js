// Fetches the live part of the page again and again and puts in what has changed.
(() => {
  "use strict";
  const live = document.getElementById("live");
  const state = document.getElementById("refresh-state");
  const toggle = document.getElementById("refresh-toggle");
  const period = Number(live.dataset.refreshMs);
  let isPaused = false;
  let isFetching = false;

  const show = (name, text) => {
    state.dataset.state = name;
    state.textContent = text;
  };

  const keepOpen = (before, after) => {
    for (const details of before.querySelectorAll("details[open][id]")) {
      const twin = after.querySelector(`#${CSS.escape(details.id)}`);
      if (twin) twin.open = true;
    }
  };

  const keepScroll = (before, after) => {
    const boxes = after.querySelectorAll("[data-scrolls]");
    before.querySelectorAll("[data-scrolls]").forEach((box, index) => {
      if (boxes[index]) boxes[index].scrollLeft = box.scrollLeft;
    });
  };

  const replace = (html) => {
    const fresh = new DOMParser().parseFromString(html, "text/html");
    for (const section of fresh.querySelectorAll("section[id]")) {
      const old = document.getElementById(section.id);
      if (!old) continue;
      keepOpen(old, section);
      if (old.outerHTML === section.outerHTML || old.contains(document.activeElement)) continue;
      const scrolled = old.cloneNode(false);
      scrolled.append(...old.childNodes);
      const adopted = document.adoptNode(section);
      old.replaceWith(adopted);
      keepScroll(scrolled, adopted);
    }
  };

  const refresh = async () => {
    if (isPaused || isFetching || document.hidden) return;
    isFetching = true;
    try {
      const answer = await fetch(live.dataset.src, { cache: "no-store" });
      if (!answer.ok) throw new Error(`status ${answer.status}`);
      replace(await answer.text());
      show("live", "Live");
    } catch (error) {
      show("lost", "No connection, trying again");
    } finally {
      isFetching = false;
    }
  };

  toggle.hidden = false;
  toggle.addEventListener("click", () => {
    isPaused = !isPaused;
    toggle.setAttribute("aria-pressed", String(isPaused));
    show(isPaused ? "paused" : "live", isPaused ? "Paused" : "Live");
    refresh();
  });
  document.addEventListener("visibilitychange", refresh);
  show("live", "Live");
  setInterval(refresh, period);
})();
