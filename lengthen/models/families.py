"""Which models' decoder layers are rebuilt here: for decoding on a CPU and for memory-lean training.

All four compute h = x + attention(norm(x)), h + MLP(norm(h)), with RMSNorm, RoPE and a gated MLP. Qwen2 adds biases to
query, key and value; Qwen3 norms queries and keys head by head. What a rebuilt layer computes is compared with the
model's own code before it is used, so a class of the same name that does something else keeps its own.
"""

REBUILT_LAYERS = {"LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer"}
