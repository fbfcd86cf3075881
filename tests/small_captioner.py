"""A small Qwen2-Audio of random weights."""

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2AudioConfig,
    Qwen2AudioEncoderConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2AudioProcessor,
    Qwen2Config,
    WhisperFeatureExtractor,
)


def write_captioner(folder, seed=0):
    """A Qwen2-Audio of random weights with 2 s of audio and one token per letter."""
    torch.manual_seed(seed)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"]
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=special[0], eos_token=special[2])
    ids = fast.convert_tokens_to_ids(special)
    extractor = WhisperFeatureExtractor(feature_size=16, chunk_length=2)
    Qwen2AudioProcessor(extractor, fast).save_pretrained(folder)
    audio_config = Qwen2AudioEncoderConfig(num_mel_bins=16, encoder_layers=1, encoder_attention_heads=2,
                                           encoder_ffn_dim=16, d_model=16, max_source_positions=100)  # fmt: skip
    text_config = Qwen2Config(vocab_size=len(fast), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                              num_attention_heads=2, num_key_value_heads=1)  # fmt: skip
    config = Qwen2AudioConfig(audio_config=audio_config, text_config=text_config, audio_token_index=ids[3])
    model = Qwen2AudioForConditionalGeneration(config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, 0.7)
    plain = fast.convert_tokens_to_ids(list("Ġabcdefghijklmnopqrstuvwxyz"))
    model.lm_head.weight.data[[i for i in range(len(fast)) if i not in plain]] = 0
    model.generation_config.update(eos_token_id=[ids[2], ids[0]], pad_token_id=ids[0], do_sample=True, temperature=0.7,
                                   top_p=0.5, top_k=20)  # fmt: skip
    model.save_pretrained(folder)
    return str(folder)
