#!/bin/sh
# python run.py --scale small
set -e
RUN=runs/small MODEL=Qwen/Qwen2.5-7B-Instruct
# Iteration 1: instructions, drafts, extensions; both roles learn from them
python generate.py instructions --model $MODEL --language en --seeds prompts/en/seeds.jsonl --count 240 \
    --output $RUN/iter_1/instructions.jsonl
python generate.py responses --model $MODEL --language en --input $RUN/iter_1/instructions.jsonl --max-attempts 3 \
    --output $RUN/iter_1/responses.jsonl
python extend.py --model $MODEL --language en --input $RUN/iter_1/responses.jsonl --samples 1 --max-attempts 6 \
    --rounds 2 --output $RUN/iter_1/extended.jsonl
python train.py --model $MODEL --language en --role generator --input $RUN/iter_1/extended.jsonl --epochs 2 \
    --output $RUN/iter_1/generator
python train.py --model $MODEL --language en --role extender --input $RUN/iter_1/extended.jsonl --epochs 2 \
    --output $RUN/iter_1/extender
# Iteration 2: instructions, drafts, extensions; both roles learn from them
python generate.py instructions --model $MODEL --language en --seeds prompts/en/seeds.jsonl \
    --dedup-against $RUN/iter_1/instructions.jsonl --count 240 --output $RUN/iter_2/instructions.jsonl
python generate.py responses --model $MODEL --language en --adapter $RUN/iter_1/generator \
    --input $RUN/iter_2/instructions.jsonl --max-attempts 3 --output $RUN/iter_2/responses.jsonl
python extend.py --model $MODEL --language en --adapter $RUN/iter_1/extender --input $RUN/iter_2/responses.jsonl \
    --samples 1 --max-attempts 6 --rounds 2 --output $RUN/iter_2/extended.jsonl
python train.py --model $MODEL --language en --role generator --adapter $RUN/iter_1/generator \
    --input $RUN/iter_2/extended.jsonl --epochs 2 --output $RUN/iter_2/generator
python train.py --model $MODEL --language en --role extender --adapter $RUN/iter_1/extender \
    --input $RUN/iter_2/extended.jsonl --epochs 2 --output $RUN/iter_2/extender
# Answers without extension; length demands for all; the Generator that learns to follow them
python generate.py instructions --model $MODEL --language en --seeds prompts/en/seeds.jsonl \
    --dedup-against $RUN/iter_1/instructions.jsonl $RUN/iter_2/instructions.jsonl --count 100 \
    --output $RUN/final/instructions.jsonl
python generate.py responses --model $MODEL --language en --adapter $RUN/iter_2/generator \
    --input $RUN/final/instructions.jsonl --samples 1 --no-length-bias --output $RUN/final/responses.jsonl
python generate.py constrain --model $MODEL --language en \
    --input $RUN/iter_1/extended.jsonl $RUN/iter_2/extended.jsonl $RUN/final/responses.jsonl --demand-min 1000 \
    --max-attempts 3 --output $RUN/final/constrained.jsonl
python train.py --model $MODEL --language en --role generator --input $RUN/final/constrained.jsonl --epochs 2 \
    --output $RUN/final/generator
# What the models write
python evaluate.py --model $MODEL --language en --output $RUN/eval/base
python evaluate.py --model $MODEL --language en --adapter $RUN/final/generator --output $RUN/eval/final
