"""Client work of sampling through servers: tokens per second of one core, against a stub that answers at once.

    python bench/served.py --texts 200 --tokens 512

The stub (tests/stub_server.py) is a process of its own, so what is counted is the CPU time of this one: requests,
streams, where a text ends, decoding. A client that manages fewer tokens than the servers draw would hold them up.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from tiny import tiny_tokenizer  # noqa: E402

from lengthen.sampling.request import Request, Sampling  # noqa: E402
from lengthen.sampling.served import Served  # noqa: E402

STUB = (
    "import sys; from stub_server import Stub\n"
    "with Stub(write=lambda body: [10 + i * i % 997 for i in range(body['max_tokens'])]) as stub:\n"
    "    print(stub.url, flush=True); sys.stdin.read()"
)


def measure(url: str, texts: int, tokens: int, stop: tuple[str, ...]) -> float:
    """Tokens per second of CPU time."""
    tokenizer = tiny_tokenizer()
    served = Served([url], tokenizer, eos_ids={tokenizer.eos_token_id}, context=2048, max_rows=64)
    sampling = Sampling(0.0, 1.0, 0, 1.0, tokens, 0, stop)
    began = time.process_time()
    for i in range(texts):
        served.add(Request(i, [5, 6, 7, i + 10], i, sampling))
    written = sum(sample.num_tokens for sample in served.run())
    seconds = time.process_time() - began
    served.close()
    return written / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=200, help="texts of each kind")
    parser.add_argument("--tokens", type=int, default=512, help="tokens of a text")
    args = parser.parse_args()
    process = subprocess.Popen(
        [sys.executable, "-c", STUB], cwd=ROOT / "tests", stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout
    url = process.stdout.readline().strip()
    rates = {"answers": measure(url, args.texts, args.tokens, ())}
    rates["with a stop string"] = measure(url, args.texts, args.tokens, ("\n\n\n",))
    process.kill()
    for name, rate in rates.items():
        print(f"{name:>20}  {rate:8,.0f} tokens/s of one core")
    print(json.dumps({"texts": args.texts, "tokens": args.tokens, **{k: round(v) for k, v in rates.items()}}))


if __name__ == "__main__":
    main()
