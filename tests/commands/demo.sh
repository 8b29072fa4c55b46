#!/bin/sh
set -e
python generate.py instructions --model smollm2 --language en --seed 0 --seeds prompts/en/seeds.jsonl --count 12 --long-words 300 --max-new-tokens 192 --output runs/demo/iter_1/instructions.jsonl
python generate.py responses --model smollm2 --language en --seed 0 --input runs/demo/iter_1/instructions.jsonl --max-new-tokens 360 --max-attempts 1 --output runs/demo/iter_1/responses.jsonl --samples 2
python extend.py --model smollm2 --language en --seed 0 --max-new-tokens 560 --input runs/demo/iter_1/responses.jsonl --samples 6 --rounds 1 --stages 2 --max-attempts 1 --min-gain 1.2 --penalty-scope output --output runs/demo/iter_1/extended.jsonl
python train.py --role generator --model smollm2 --language en --seed 0 --input runs/demo/iter_1/extended.jsonl --rank 8 --alpha 16 --learning-rate 0.0002 --epochs 2 --output runs/demo/iter_1/generator
python train.py --role extender --model smollm2 --language en --seed 0 --input runs/demo/iter_1/extended.jsonl --rank 8 --alpha 16 --learning-rate 0.0002 --epochs 2 --output runs/demo/iter_1/extender
python generate.py instructions --model smollm2 --language en --seed 0 --seeds prompts/en/seeds.jsonl --dedup-against runs/demo/iter_1/instructions.jsonl --count 6 --long-words 300 --max-new-tokens 192 --output runs/demo/final/instructions.jsonl
python generate.py responses --model smollm2 --language en --seed 0 --adapter runs/demo/iter_1/generator --input runs/demo/final/instructions.jsonl --max-new-tokens 560 --max-attempts 1 --output runs/demo/final/responses.jsonl --samples 1 --no-length-bias
python generate.py constrain --model smollm2 --language en --seed 0 --input runs/demo/iter_1/extended.jsonl runs/demo/final/responses.jsonl --demand-min 150 --demand-max 1500 --demand-steps 50,100 --max-attempts 1 --output runs/demo/final/constrained.jsonl
python train.py --role generator --model smollm2 --language en --seed 0 --input runs/demo/final/constrained.jsonl --rank 8 --alpha 16 --learning-rate 0.0002 --epochs 2 --output runs/demo/final/generator
python evaluate.py --model smollm2 --language en --seed 0 --max-new-tokens 560 --benchmark mini --limit 8 --no-probes --output runs/demo/eval/base
python evaluate.py --model smollm2 --language en --seed 0 --adapter runs/demo/final/generator --max-new-tokens 560 --benchmark mini --limit 8 --no-probes --output runs/demo/eval/final
