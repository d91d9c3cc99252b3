"""Every program of the guide to clients, run as it stands there with only its address changed."""

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY
from tests.e2e.conftest import Node

GUIDE = REPOSITORY / "docs" / "guides" / "clients.md"
PROGRAM = re.compile(r"^```(js|python)\n(.*?)^```", re.MULTILINE | re.DOTALL)
FIELDS = r"city='(Paris|Rome)' is_capital=(True|False)"
ANSWER = rf"Answer\({FIELDS.replace(' ', ', ')}\)"
PRINTS = {
    "Chat from JavaScript": r".*Paris.*",
    "Streaming from JavaScript": r".*Paris.*",
    "Tools from JavaScript": r"Sunny in (Paris|Rome)\.",
    "LangChain": rf"GetWeather (Paris|Rome)\n{FIELDS}",
    "LiteLLM": r'get_weather {"city": ?"(Paris|Rome)"}\nAnswer\(is_capital=(True|False)\)',
    "Instructor": rf"{ANSWER}\n{ANSWER}",
}
pytestmark = [pytest.mark.e2e, pytest.mark.model, pytest.mark.timeout(120)]


def programs() -> dict[str, tuple[str, str]]:
    """Return the language and the text of each section's program."""
    sections = [
        part.partition("\n") for part in re.split(r"^## ", GUIDE.read_text(), flags=re.M)[1:]
    ]
    found = {heading: PROGRAM.findall(text) for heading, _, text in sections}
    return {heading: text for heading, programs in found.items() for text in programs}


def test_every_program_of_the_guide_is_tried() -> None:
    assert programs().keys() == PRINTS.keys()


@pytest.mark.parametrize("heading", PRINTS)
def test_program_prints_what_it_should(
    heading: str, clients: Path, warm_node: Node, tmp_path: Path
) -> None:
    language, text = programs()[heading]
    assert "http://127.0.0.1:8000" in text
    text = text.replace("http://127.0.0.1:8000", warm_node.url)
    program = tmp_path / ("program.mjs" if language == "js" else "program.py")
    program.write_text(text)
    (tmp_path / "node_modules").symlink_to(Path(__file__).parent / "node_modules")
    done = subprocess.run(
        [clients / "bin" / ("node" if language == "js" else "python"), program],
        env=os.environ | {"LITELLM_LOCAL_MODEL_COST_MAP": "True"},  # else it asks the internet
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(PRINTS[heading], done.stdout.strip(), re.DOTALL), done.stdout
