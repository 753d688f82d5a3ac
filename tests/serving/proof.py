"""Compares answers through a real vLLM server with the module's own: on real prompts, by client and gateway.

It starts the server and ``lopa serve`` (tests/serving/vllm_server.py says what for), and writes a table::

    LOPA_VLLM_PYTHON=~/vllm/bin/python python -m tests.serving.proof [--items 50] [--sentences 200] [--tokens 32]

Completions are CRUXEval-O's, chats are banking77's questions, every second one with a turn before it, and sentences
are SST-2's; soft prompts are those of LoPA on MiniLM's vectors, moved away from their initial values.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import functools
import json
import operator
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import datasets
import openai
import torch
from lightning.pytorch import Trainer

from lopa_lightning import (
    Bundle,
    CausalLMModule,
    ClassificationModule,
    InstanceEncoderSpec,
    LoPA,
    LoPAClient,
    PretrainedSpec,
    ServedPrompter,
    TextClassificationDataModule,
)
from lopa_lightning.serving import export
from tests.conftest import REAL_DATA, REAL_MODELS
from tests.serving.vllm_server import missing, vllm_server

MODEL, ENCODER = (
    REAL_MODELS / name for name in ("HuggingFaceTB/SmolLM2-135M-Instruct", "sentence-transformers/all-MiniLM-L6-v2")
)
AT_ONCE = 16


def main() -> None:
    """Starts the server, asks it, and writes what was equal."""
    options = argparse.ArgumentParser("python -m tests.serving.proof", description=__doc__)
    options.add_argument("--items", type=int, default=50, help="completions, and chats")
    options.add_argument("--sentences", type=int, default=200, help="that are labelled")
    options.add_argument("--tokens", type=int, default=32, help="generated for each")
    options.add_argument("--json", type=Path, default=Path("runs/proof.json"), help="what is written")
    given = options.parse_args()
    if (why := missing()) is not None:
        options.error(why)
    given.json.parent.mkdir(parents=True, exist_ok=True)
    system = generator("system", given.tokens)
    programs, talks = completions(given.items), chats(given.items)
    cases = {
        "CRUXEval, before": (generator("before", given.tokens), programs),
        "CRUXEval, system": (system, [one_turn(text) for text in programs]),
        "chats, system": (system, talks),
        "chats, user": (generator("user", given.tokens), talks),
        "SST-2": (classifier(), sentences(given.sentences)),
    }
    own = {name: own_answers(model, prompts) for name, (model, prompts) in cases.items()}
    with tempfile.TemporaryDirectory() as folder, vllm_server(str(MODEL)) as server:
        for name, (model, _) in cases.items():
            written(model, Path(folder) / name)
        bundles = {name: str(Path(folder) / name) for name in cases}
        with gateway(server, bundles) as address:
            asked = {name: prompts for name, (_, prompts) in cases.items()}
            table = [*of_clients(server, bundles, asked, own, given.tokens)]
            table += of_gateway(server, address, asked, own, given.tokens)
    given.json.write_text(json.dumps(table, indent=2))
    print("\n| answers | through | equal | of | seconds |\n|-|-|-:|-:|-:|")
    for row in table:
        print("| {answers} | {through} | {equal} | {of} | {seconds:.0f} |".format_map(row))
    sys.exit(any(row["equal"] != row["of"] for row in table))


def compared(answers: str, through: str, ask: Callable[[], list[str]], right: Sequence[str]) -> dict[str, Any]:
    """Returns a row of the table: how many answers are the right ones."""
    start = time.perf_counter()
    found = ask()
    row = {"answers": answers, "through": through, "equal": 0, "of": len(right), "seconds": 0.0}
    row |= {"equal": sum(map(operator.eq, found, right)), "seconds": time.perf_counter() - start}
    print(row, flush=True)
    return row


def each(ask: Callable[[Any], str], prompts: Sequence[Any]) -> list[str]:
    """Asks for every prompt, several at a time."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(ask, prompts))


def answer(client: openai.OpenAI, model: str, options: Mapping[str, Any], prompt: Any) -> str:
    """Returns the answer to a text or a chat, by OpenAI's own client."""
    if isinstance(prompt, str):
        return client.completions.create(model=model, prompt=prompt, **options).choices[0].text
    return str(client.chat.completions.create(model=model, messages=prompt, **options).choices[0].message.content)


def of_clients(
    server: str, bundles: Mapping[str, str], asked: Mapping[str, Any], own: Mapping[str, Any], tokens: int
) -> Iterator[dict[str, Any]]:
    """Compares what ``LoPAClient`` answers."""
    greedy: dict[str, Any] = {"temperature": 0, "max_tokens": tokens}
    for name, folder in bundles.items():
        source = ServedPrompter(Bundle.from_pretrained(folder), max_prompt_bytes=2**22)
        client = LoPAClient(server, source, max_inflight=AT_ONCE)
        if source.task is not None:
            ask: Callable[[], list[str]] = functools.partial(_labels, client, asked[name])
        else:
            ask = functools.partial(_answers, client, asked[name], greedy)
        yield compared(name, "client", ask, own[name])
        client.close()


def _labels(client: LoPAClient, texts: list[str]) -> list[str]:
    return [record["label"] for record in client.classify(texts)]


def _answers(client: LoPAClient, prompts: list[Any], options: Mapping[str, Any]) -> list[str]:
    choices = [found.choices[0] for found in client.map(prompts, **options)]
    return [choice.text if hasattr(choice, "text") else choice.message.content for choice in choices]


def of_gateway(
    server: str, address: str, asked: Mapping[str, Any], own: Mapping[str, Any], tokens: int
) -> list[dict[str, Any]]:
    """Compares what the gateway answers, for each bundle alone and for all of them mixed with plain requests."""
    greedy = {"temperature": 0, "max_tokens": tokens}
    stock, through = (
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=600) for url in (server, address)
    )
    labelled = [one_turn(text) for text in asked["SST-2"]]
    asked = {**asked, "SST-2": labelled}
    options = {name: {} if name == "SST-2" else greedy for name in asked}
    asks = {name: functools.partial(answer, through, name, options[name]) for name in asked}
    table = [
        compared(name, "gateway", functools.partial(each, asks[name], prompts), own[name])
        for name, prompts in asked.items()
    ]
    half = len(asked["chats, user"]) // 2
    prompts = [*asked["chats, user"][:half], *asked["CRUXEval, before"][:half]]
    asks["plain"], right = (
        functools.partial(answer, through, str(MODEL), greedy),
        each(functools.partial(answer, stock, str(MODEL), greedy), prompts),
    )
    table.append(compared("plain requests", "gateway", functools.partial(each, asks["plain"], prompts), right))
    mixed = [("plain", *pair) for pair in zip(prompts, right, strict=True)]
    mixed += [(name, *pair) for name in asked for pair in list(zip(asked[name], own[name], strict=True))[: 2 * half]]
    mixed = [mixed[at] for at in torch.randperm(len(mixed), generator=torch.Generator().manual_seed(0)).tolist()]
    ask = functools.partial(each, lambda one: asks[one[0]](one[1]), mixed)
    table.append(compared(f"all mixed, {AT_ONCE} at a time", "gateway", ask, [right for _, _, right in mixed]))
    return table


def one_turn(text: str) -> list[dict[str, str]]:
    """Returns a chat of one message."""
    return [{"role": "user", "content": text}]


def completions(count: int) -> list[str]:
    """Returns CRUXEval-O's questions: a program and the beginning of an assertion on it."""
    rows = datasets.load_dataset(str(REAL_DATA / "cruxeval-org/cruxeval"), split="test").select(range(count))
    return [f"{row['code']}\n\nassert f({row['input']}) ==" for row in rows]


def chats(count: int) -> list[list[dict[str, str]]]:
    """Returns chats on banking77's questions, every second one with a turn before it."""
    with (REAL_DATA / "PolyAI/banking77/test.csv").open(newline="") as file:
        questions = [row["text"] for row in csv.DictReader(file)]
    asked = [{"role": "user", "content": question} for question in questions[:: len(questions) // (count + 1)][:count]]
    turn = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hello! How can I help?"}]
    return [[*turn, question] if index % 2 else [question] for index, question in enumerate(asked)]


def sentences(count: int) -> list[str]:
    """Returns the first sentences of SST-2's validation split."""
    rows = datasets.load_dataset(str(REAL_DATA / "nyu-mll/glue"), "sst2", split="validation")
    return [row["sentence"].strip() for row in rows.select(range(count))]


def moved(model: Any) -> Any:
    """Returns the module with prompts that are far from their initial values, and others for each text."""
    model.configure_model()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model._net().prompt_encoder.parameters():
            parameter += 0.3 * parameter.std(correction=0) * torch.randn_like(parameter)
    model.learned = True
    return model.eval()


def _parts() -> dict[str, Any]:
    return {
        "backbone": PretrainedSpec(str(MODEL), dtype="float32"),
        "prompt_encoder": functools.partial(LoPA, num_virtual_tokens=10, rank=4, hidden_dim=64),
        "instance_encoder": InstanceEncoderSpec(str(ENCODER), pooling="mean"),
    }


def generator(placement: str, tokens: int) -> Any:
    """Returns a module that generates."""
    return moved(CausalLMModule(**_parts(), placement=placement, generation={"max_new_tokens": tokens}))


def classifier() -> Any:
    """Returns a module that has SST-2's labels and words."""
    model = ClassificationModule(**_parts(), objective="causal_lm", placement="system")
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.csv"
        rows.write_text("text,label\na dull film,negative\ngreat fun,positive\n")
        data = TextClassificationDataModule(
            data_files=dict.fromkeys(("train", "test"), str(rows)),
            labels=["negative", "positive"],
            words=["no", "yes"],
            template=["{text}\nIs that praise? {mask}"],
        )
        model.learned = True
        Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False).predict(model, data)
    return moved(model)


def own_answers(model: Any, prompts: list[Any]) -> list[Any]:
    """Returns what the module answers by itself."""
    with torch.no_grad():
        if isinstance(model, ClassificationModule):
            return [record["label"] for record in model.predict(prompts)]
        return [text for (text,) in model.generate(prompts)]


def written(model: Any, folder: Path) -> Path:
    """Returns the folder of the module's bundle."""
    tensors = {key: value.detach() for key, value in model.state_dict().items()}
    Bundle(export._config(model, {}, {}), tensors, "", [], None).save_pretrained(folder)
    return folder


@contextlib.contextmanager
def gateway(server: str, folders: Mapping[str, Path]) -> Iterator[str]:
    """Runs ``lopa serve`` until the block ends, and yields its address."""
    command = [sys.executable, "-m", "lopa_lightning", "serve", "--upstream", server, "--port", "0"]
    command += [f"--bundle={name}={folder}" for name, folder in folders.items()]
    command += ["--max_prompt_bytes", str(2**22)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env={**os.environ}) as running:
        assert running.stdout is not None
        ready = re.search(r"at (http://\S+)/v1", running.stdout.readline())
        if ready is None:
            raise RuntimeError("lopa serve did not start")
        try:
            yield ready[1]
        finally:
            running.send_signal(signal.SIGTERM)
            running.wait(60)


if __name__ == "__main__":
    main()
