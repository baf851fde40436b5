"""The streaming merge against PEFT's, on a model of several files with random weights.

Run with `python -m benchmarks.merge [--pairs 3] [--layers 16]`. Each merge runs in a process of its own, ours and
PEFT's by turns; PEFT's loads the model and the adapter, merges and saves. Counted are the time after the imports, and
the most anonymous memory beyond what the imports took (pages of files, which the system takes back at need, are no part
of it). Exit status 1 where a target is missed.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

TIME_TARGET, MEMORY_TARGET = 1.0, 0.35
SHARD = "100MB"


def make(directory: Path, layers: int) -> None:
    """Write a Llama of random bfloat16 weights in files of at most 100 MB, and a LoRA adapter of rank 16 for it."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32000, hidden_size=1024, intermediate_size=2816, num_hidden_layers=layers, num_attention_heads=16
    )
    model = LlamaForCausalLM(config).bfloat16()
    model.save_pretrained(directory / "base", max_shard_size=SHARD)
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    lora = LoraConfig(r=16, lora_alpha=16, target_modules=names, init_lora_weights=False)
    get_peft_model(model, lora).save_pretrained(str(directory / "adapter"))


def ours(directory: Path) -> None:
    """The merge of the pipeline."""
    from tasks.export.adapter_weights import Adapter
    from tasks.export.weight_files import merge_files

    merge_files(directory / "base", Adapter(directory / "adapter"), directory / "merged")


def pefts(directory: Path) -> None:
    """PEFT's."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory / "base", dtype="auto")
    merged = PeftModel.from_pretrained(model, str(directory / "adapter")).merge_and_unload(safe_merge=True)
    merged.save_pretrained(directory / "merged", max_shard_size=SHARD)


def anonymous_bytes() -> int:
    """Resident memory of this process that is no file's."""
    line = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(line[1]) * 1024 if line else 0


def child(who: str, directory: Path) -> None:
    """Merge once; print seconds and bytes as JSON."""
    import peft  # noqa: F401 - imported before the clock starts
    from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401 - likewise

    import tasks.export.adapter_weights
    import tasks.merge  # noqa: F401 - likewise

    before = peak = anonymous_bytes()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, anonymous_bytes())

    watching = threading.Thread(target=watch, daemon=True)
    watching.start()
    started = time.perf_counter()
    {"ours": ours, "peft": pefts}[who](directory)
    seconds = time.perf_counter() - started
    done.set()
    watching.join()
    print(json.dumps({"seconds": seconds, "bytes": peak - before}))


def main() -> int:
    """Measure, print, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child[0], Path(arguments.child[1]))
        return 0
    measured: dict[str, list[dict[str, float]]] = {"ours": [], "peft": []}
    with tempfile.TemporaryDirectory() as directory:
        make(Path(directory), arguments.layers)
        files = list(Path(directory).glob("base/*.safetensors"))
        size = sum(file.stat().st_size for file in files)
        for _ in tqdm(range(arguments.pairs), unit="pair"):
            for who, runs in measured.items():
                with tempfile.TemporaryDirectory(dir=directory) as merged:
                    for name in ("base", "adapter"):
                        (Path(merged) / name).symlink_to(Path(directory) / name)
                    (Path(merged) / "merged").mkdir()
                    command = [sys.executable, "-m", "benchmarks.merge", "--child", who, merged]
                    done = subprocess.run(command, check=True, capture_output=True, text=True)
                runs.append(json.loads(done.stdout.splitlines()[-1]))
    table = Table("", "time", "peak memory", title=f"merging into {size / 1e6:.0f} MB in {len(files)} files, medians")
    seconds = {who: statistics.median(run["seconds"] for run in runs) for who, runs in measured.items()}
    memory = {who: statistics.median(run["bytes"] for run in runs) for who, runs in measured.items()}
    for who in measured:
        table.add_row(who, f"{seconds[who]:.2f} s", f"{memory[who] / 1e6:.0f} MB")
    Console().print(table)
    ratios = seconds["ours"] / seconds["peft"], memory["ours"] / memory["peft"]
    print(f"time ratio {ratios[0]:.2f} (target {TIME_TARGET}), memory ratio {ratios[1]:.2f} (target {MEMORY_TARGET})")
    return 0 if ratios[0] <= TIME_TARGET and ratios[1] <= MEMORY_TARGET else 1


if __name__ == "__main__":
    sys.exit(main())
