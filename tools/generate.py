"""Continue a prompt with a trained model.

    python tools/generate.py runs/quickstart/hf --prompt "def main" --tokens 64

CKPT is an own checkpoint, a run directory or a Hugging Face folder. Exit codes: 0 done, 2 usage, 3 data, 4 checkpoint.
"""

from _command import Arguments, find_tokenizer, run

from megagrow.checkpoint import hf
from megagrow.checkpoint.source import load_model, open_source
from megagrow.config import require
from megagrow.data.tokenizer import load_tokenizer
from megagrow.generate import generate
from megagrow.parallel.mesh import Mesh


def main() -> None:
    parser = Arguments(description="Continue a prompt with a trained model.")
    parser.add_argument("checkpoint", metavar="CKPT")
    parser.add_argument("--prompt", default="def ")
    parser.add_argument("--tokens", type=int, default=64, help="tokens to add")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the most likely token")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokenizer", default="", help="when the checkpoint does not name one")
    options = parser.parse_args()

    require(options.tokens >= 0, f"--tokens {options.tokens} must not be negative")
    require(options.temperature >= 0, f"--temperature {options.temperature} must not be negative")
    source = open_source(options.checkpoint)
    tokenizer = load_tokenizer(find_tokenizer(options.tokenizer, source))
    model = load_model(source, Mesh.single())
    begin_ids = tokenizer.begin_ids if hf.is_hf_folder(source.path) else ()  # as transformers does
    how = options.tokens, options.temperature, options.seed
    print(generate(model, tokenizer, options.prompt, *how, begin_ids))


if __name__ == "__main__":
    run(main)
