"""A random Llama and a byte-level tokenizer, small enough to be made for every test run."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BOS = "<|bos|>"
POSITIONS = 1024


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte, so that digits are single."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {BOS: 0} | {char: i + 1 for i, char in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, pad_token=BOS)


def tiny_model(seed: int = 0) -> LlamaForCausalLM:
    """Two layers, 4 query and 2 key/value heads of 32; weights large enough to have opinions."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=257,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=POSITIONS,
        initializer_range=0.15,
        bos_token_id=0,
        eos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def save_tiny(folder: Path) -> Path:
    """Write model, tokenizer and a text `text.txt` of 12 000 bytes into a folder."""
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    generator = torch.Generator().manual_seed(1)
    letters = torch.randint(97, 123, (12_000,), generator=generator).tolist()
    (folder / "text.txt").write_bytes(bytes(letters))
    return folder
