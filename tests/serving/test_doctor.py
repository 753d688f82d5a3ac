"""``lopa doctor``: what it says of a server that is right, and of one that is wrong in each way."""

from __future__ import annotations

import copy
import dataclasses
import functools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import AutoTokenizer

from lopa_lightning import LoPAClient, PretrainedSpec, ServedPrompter
from lopa_lightning.backbones.pretrained import load_model
from lopa_lightning.cli import main
from lopa_lightning.serving.doctor import Finding, findings
from lopa_lightning.serving.export import export_bundle
from tests.serving.helpers import checkpoint
from tests.serving.upstream import Upstream, running
from tests.tiny import WIDTH

Tiny = Callable[[str], str]
Make = Callable[[str], ServedPrompter]


@pytest.fixture(scope="module")
def served(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Make:
    @functools.cache
    def make(kind: str) -> ServedPrompter:
        _, path = checkpoint(kind, tmp_path_factory.mktemp("made") / "run", tiny, tiny("chat"))
        return ServedPrompter(export_bundle(path, ["the film was", "No"]))

    return make


@pytest.fixture(scope="module")
def model(tiny: Tiny) -> Any:
    return load_model(PretrainedSpec(tiny("chat")), "causal_lm")


@pytest.fixture
def upstream(tiny: Tiny, model: Any) -> Iterator[Upstream]:
    with running(Upstream(AutoTokenizer.from_pretrained(tiny("chat")), model)) as server:
        server.name = tiny("chat")
        yield server


def found(url: str, source: ServedPrompter, **options: Any) -> list[Finding]:
    return list(findings(LoPAClient(url, source, max_retries=0, **options)))


CHECKS = ["server", "version", "model", "flag", "layout", "prompts", "parity", "size"]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("kind", ["completion", "chat user", "chat words"])
def test_a_right_server_passes_every_check(kind: str, served: Make, upstream: Upstream) -> None:
    told = found(upstream.url, served(kind))
    assert [(each.check, each.status) for each in told] == [(name, "ok") for name in CHECKS]
    by = "token by token" if kind.startswith("chat") else "by number"
    assert by in told[4].said


@pytest.mark.sampled(5)
@pytest.mark.parametrize(
    ("wrong", "check", "status", "said"),
    [
        ({"key": "secret"}, "server", "FAIL", "give its key by --api_key"),
        ({"version": "0.20.2"}, "version", "FAIL", "vLLM 0.20.2 takes no soft prompts in chats; install 0.32"),
        ({"version": "0.21.0"}, "version", "warn", "install 0.26, and better 0.32 or later"),
        ({"version": "0.31.1rc1"}, "version", "warn", "install 0.32 or later"),
        ({"version": None}, "version", "warn", "must be vLLM 0.21 or later"),
        ({"name": "other"}, "model", "warn", "the server calls it 'other'"),
        ({"takes_prompts": False}, "flag", "FAIL", "start it with --enable-prompt-embeds"),
        ({"model": SimpleNamespace(config=SimpleNamespace(hidden_size=16))}, "width", "FAIL", "32 does not match 16"),
        ({"statuses": [500]}, "request", "FAIL", "refuses a soft prompt"),
        ({"drops": True}, "layout", "FAIL", "the soft prompt was dropped"),
        ({"extra_tokens": 1}, "layout", "FAIL", r"expected \d+: .* its own chat template"),
        ({"reverses": True}, "layout", "FAIL", "another chat is read"),
        ({"tokenizes": False}, "layout", "ok", "by number of tokens"),
        ({"scale": 1 / WIDTH**0.5}, "parity", "FAIL", r"scale=5\.65685\) they fit"),
        ({"scale": 0.1}, "parity", "FAIL", "serve the bundle's backbone"),
        ({"most": 2**20}, "size", "warn", r"1 MiB is not taken: .*client_max_body_size"),
    ],
)
def test_what_is_wrong_is_named_with_a_remedy(
    wrong: dict[str, Any], check: str, status: str, said: str, served: Make, upstream: Upstream
) -> None:
    for name, value in wrong.items():
        setattr(upstream, name, value)
    told = found(upstream.url, served("chat system"))
    others = {each.status for each in told if each.check != check}
    (finding,) = (each for each in told if each.check == check)
    assert finding.status == status, finding
    assert re.search(said, finding.said), finding
    assert others <= {"ok"} or check == "layout"


def test_more_that_is_wrong(served: Make, upstream: Upstream, model: Any) -> None:
    assert [each.status for each in found("http://127.0.0.1:9", served("completion"))] == ["FAIL"]
    upstream.key = "secret"
    assert {each.status for each in found(upstream.url, served("completion"), api_key="secret")} == {"ok"}
    upstream.scale = 1 / WIDTH**0.5  # as a server that wants embeddings scaled by sqrt(d): the text's too
    (parity,) = (each for each in found(upstream.url, served("completion"), api_key="secret") if each.check == "parity")
    assert "scale=5.65685) they fit" in parity.said
    upstream.statuses = [200] * (1 + len(served("completion").prompter.bundle.rows)) + [400]  # flag, layout; parity
    (parity,) = (each for each in found(upstream.url, served("completion"), api_key="secret") if each.check == "parity")
    assert re.search("does not tell the log probabilities .* 400 .*--max-logprobs", parity.said), parity
    upstream.statuses = []
    upstream.scale, upstream.model = 1.0, copy.deepcopy(model).bfloat16()
    (parity,) = (each for each in found(upstream.url, served("completion"), api_key="secret") if each.check == "parity")
    assert (parity.status, "as of a server in bfloat16" in parity.said) == ("warn", True), parity


def test_soft_prompts_that_are_not_the_bundles_are_told(served: Make, upstream: Upstream) -> None:
    source = copy.copy(served("completion"))
    bundle = source.prompter.bundle
    assert bundle.prompts is not None
    source.prompter = copy.copy(source.prompter)
    source.prompter.bundle = dataclasses.replace(bundle, prompts=bundle.prompts + 0.1)
    (told,) = (each for each in found(upstream.url, source) if each.check == "prompts")
    assert told.status == "FAIL"
    assert "use the instance encoder's files" in told.said


def test_the_command_prints_a_line_a_check_and_fails_where_one_does(
    served: Make, upstream: Upstream, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    served("soft").prompter.bundle.save_pretrained(tmp_path / "OUT")
    command = ["doctor", "--upstream", upstream.url, "--bundle", str(tmp_path / "OUT")]
    main(command)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [["ok", name] for name in CHECKS]
    main([*command, "--model", "another"])
    assert "the server calls it 'another'" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([*command, "--max_prompt_bytes", "9"])
    assert "max_prompt_bytes is 9: raise it by" in capsys.readouterr().out.splitlines()[-1]
    upstream.takes_prompts = False
    with pytest.raises(SystemExit) as stop:
        main(command)
    assert stop.value.code == 1
    assert capsys.readouterr().out.splitlines()[-1].startswith("FAIL  flag")
