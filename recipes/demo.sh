#!/bin/sh
# python run.py
set -e
RUN=runs/demo MODEL=smollm2
# Iteration 1: instructions, drafts, extensions; both roles learn from them
python generate.py instructions --model $MODEL --language en --seeds prompts/en/seeds.jsonl --count 12 \
    --long-words 300 --max-new-tokens 192 --output $RUN/iter_1/instructions.jsonl
python generate.py responses --model $MODEL --language en --input $RUN/iter_1/instructions.jsonl --max-attempts 1 \
    --max-new-tokens 360 --output $RUN/iter_1/responses.jsonl
python extend.py --model $MODEL --language en --input $RUN/iter_1/responses.jsonl --samples 6 --max-attempts 1 \
    --rounds 1 --max-new-tokens 560 --output $RUN/iter_1/extended.jsonl
python train.py --model $MODEL --language en --role generator --input $RUN/iter_1/extended.jsonl --epochs 2 \
    --learning-rate 0.0002 --output $RUN/iter_1/generator
python train.py --model $MODEL --language en --role extender --input $RUN/iter_1/extended.jsonl --epochs 2 \
    --learning-rate 0.0002 --output $RUN/iter_1/extender
# Answers without extension; length demands for all; the Generator that learns to follow them
python generate.py instructions --model $MODEL --language en --seeds prompts/en/seeds.jsonl \
    --dedup-against $RUN/iter_1/instructions.jsonl --count 6 --long-words 300 --max-new-tokens 192 \
    --output $RUN/final/instructions.jsonl
python generate.py responses --model $MODEL --language en --adapter $RUN/iter_1/generator \
    --input $RUN/final/instructions.jsonl --samples 1 --no-length-bias --max-attempts 1 --max-new-tokens 560 \
    --output $RUN/final/responses.jsonl
python generate.py constrain --model $MODEL --language en \
    --input $RUN/iter_1/extended.jsonl $RUN/final/responses.jsonl --demand-min 150 --demand-max 1500 \
    --demand-steps 50,100 --max-attempts 1 --output $RUN/final/constrained.jsonl
python train.py --model $MODEL --language en --role generator --input $RUN/final/constrained.jsonl --epochs 2 \
    --learning-rate 0.0002 --output $RUN/final/generator
# What the models write
python evaluate.py --model $MODEL --language en --limit 8 --no-probes --max-new-tokens 560 --output $RUN/eval/base
python evaluate.py --model $MODEL --language en --adapter $RUN/final/generator --limit 8 --no-probes \
    --max-new-tokens 560 --output $RUN/eval/final
