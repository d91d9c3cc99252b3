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

  const replace = (html) => {
    const fresh = new DOMParser().parseFromString(html, "text/html");
    for (const section of fresh.querySelectorAll("section[id]")) {
      const old = document.getElementById(section.id);
      if (!old) continue;
      keepOpen(old, section);
      if (old.outerHTML === section.outerHTML) continue;
      const focused = old.contains(document.activeElement) ? document.activeElement : null;
      if (focused && !focused.id) continue; // it could not be found again
      const positions = [...old.querySelectorAll(".scroll")].map((box) => box.scrollLeft);
      old.replaceWith(document.adoptNode(section));
      section.querySelectorAll(".scroll").forEach((box, index) => {
        box.scrollLeft = positions[index] ?? 0;
      });
      if (focused) document.getElementById(focused.id)?.focus({ preventScroll: true });
    }
  };

  const refresh = async () => {
    if (isPaused || isFetching || document.hidden) return;
    isFetching = true;
    try {
      const answer = await fetch(live.dataset.src, { cache: "no-store" });
      if (!answer.ok) throw new Error(`status ${answer.status}`);
      const html = await answer.text();
      if (isPaused) return;
      replace(html);
      show("live", "Live");
    } catch (error) {
      if (!isPaused) show("lost", "No connection, trying again");
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
