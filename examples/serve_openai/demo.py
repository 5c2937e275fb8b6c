"""A tiny language model and three adapters, made in seconds and without a download.

    python examples/serve_openai/demo.py demo

The model recites a few sentences, and each adapter has learnt others. That is all that they know:
answers show which adapters were in force, and mean nothing.
"""

import argparse
import random
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

TEXTS = {
    "base": "the river runs to the sea and the wind comes home over the green hills at night .",
    "sql": "SELECT name , town FROM users WHERE age > 21 AND city = ? ORDER BY birthday LIMIT 10 ;",
    "french": "le chat dort sur la vieille chaise et rêve du soleil qui revient chaque printemps .",
    "legal": "the party of the first part shall hereby notify the court of any breach thereof .",
}
RANKS = {"sql": 16, "french": 8, "legal": 16}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# A prompt is read by the character, and an answer is written by the word.
CHARACTERS = ["\n", *map(chr, range(32, 127))]
WORDS = sorted({f" {word}" for text in TEXTS.values() for word in text.split()})
SPECIAL = ["<bos>", "<eos>", "<pad>", "<unk>"]
CHAT = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"


def make(folder: Path, steps: int = 250) -> None:
    """Write folder/base and folder/adapters/NAME, each trained for so many steps."""
    random.seed(0)
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # in products this small, threads wait for one another: up to 35 times
    vocabulary = {token: i for i, token in enumerate([*CHARACTERS, *WORDS, *SPECIAL])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        chat_template=CHAT,
    ).save_pretrained(folder / "base")
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        bos_token_id=vocabulary["<bos>"],
        eos_token_id=vocabulary["<eos>"],
        pad_token_id=vocabulary["<pad>"],
        initializer_range=0.1,  # a head that adapters, which leave it as it is, can answer by
    )
    model = LlamaForCausalLM(config)
    train(model, vocabulary, TEXTS["base"], steps)
    model.save_pretrained(folder / "base")
    for name, rank in RANKS.items():
        lora = LoraConfig(
            r=rank, lora_alpha=2 * rank, target_modules=TARGETS, task_type="CAUSAL_LM"
        )
        adapted = get_peft_model(model, lora)
        train(adapted, vocabulary, TEXTS[name], steps)
        adapted.save_pretrained(folder / "adapters" / name)
        model = adapted.unload()
    torch.set_num_threads(threads)


def train(model: torch.nn.Module, vocabulary: dict[str, int], text: str, steps: int) -> None:
    """Teach it to answer with a text, from any word of it on, whatever the prompt is."""
    words = [vocabulary[f" {word}"] for word in text.split()]
    optimizer = torch.optim.AdamW(
        [weight for weight in model.parameters() if weight.requires_grad], lr=1e-2
    )
    slower = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.05, steps)
    for _ in range(steps):
        rows, length = [], random.randint(4, 24)
        for _ in range(8):
            prompt = "".join(random.choices(CHARACTERS, k=length)) + "assistant:"
            start = random.randrange(len(words))
            answer = (words[start:] + words)[: len(words)]
            rows.append([vocabulary[c] for c in prompt] + answer)
        ids = torch.tensor(rows)
        labels = ids.clone()
        labels[:, : -len(words)] = -100
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        slower.step()
        optimizer.zero_grad()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="where to write base/ and adapters/")
    folder = parser.parse_args().folder
    make(folder)
    adapters = " ".join(f"{name}={folder / 'adapters' / name}" for name in RANKS)
    print(f"Now: python {Path(__file__).parent} {folder / 'base'} {adapters}")
