#!/bin/sh
# python run.py --scale paper
set -e
RUN=runs/paper MODEL=Qwen/Qwen2.5-7B-Instruct
# Iteration 1: instructions, drafts, extensions; both roles learn from them
python generate.py instructions --model $MODEL --seeds prompts/en/seeds.jsonl prompts/zh/seeds.jsonl --count 5000 \
    --output $RUN/iter_1/instructions.jsonl
python generate.py responses --model $MODEL --input $RUN/iter_1/instructions.jsonl \
    --output $RUN/iter_1/responses.jsonl
python extend.py --model $MODEL --input $RUN/iter_1/responses.jsonl --output $RUN/iter_1/extended.jsonl
python train.py --model $MODEL --role generator --input $RUN/iter_1/extended.jsonl --output $RUN/iter_1/generator
python train.py --model $MODEL --role extender --input $RUN/iter_1/extended.jsonl --output $RUN/iter_1/extender
# Iteration 2: instructions, drafts, extensions; both roles learn from them
python generate.py instructions --model $MODEL --seeds prompts/en/seeds.jsonl prompts/zh/seeds.jsonl \
    --dedup-against $RUN/iter_1/instructions.jsonl --count 5000 --output $RUN/iter_2/instructions.jsonl
python generate.py responses --model $MODEL --adapter $RUN/iter_1/generator --input $RUN/iter_2/instructions.jsonl \
    --output $RUN/iter_2/responses.jsonl
python extend.py --model $MODEL --adapter $RUN/iter_1/extender --input $RUN/iter_2/responses.jsonl \
    --output $RUN/iter_2/extended.jsonl
python train.py --model $MODEL --role generator --adapter $RUN/iter_1/generator --input $RUN/iter_2/extended.jsonl \
    --output $RUN/iter_2/generator
python train.py --model $MODEL --role extender --adapter $RUN/iter_1/extender --input $RUN/iter_2/extended.jsonl \
    --output $RUN/iter_2/extender
# Iteration 3: instructions, drafts, extensions; both roles learn from them
python generate.py instructions --model $MODEL --seeds prompts/en/seeds.jsonl prompts/zh/seeds.jsonl \
    --dedup-against $RUN/iter_1/instructions.jsonl $RUN/iter_2/instructions.jsonl --count 5000 \
    --output $RUN/iter_3/instructions.jsonl
python generate.py responses --model $MODEL --adapter $RUN/iter_2/generator --input $RUN/iter_3/instructions.jsonl \
    --output $RUN/iter_3/responses.jsonl
python extend.py --model $MODEL --adapter $RUN/iter_2/extender --input $RUN/iter_3/responses.jsonl \
    --output $RUN/iter_3/extended.jsonl
python train.py --model $MODEL --role generator --adapter $RUN/iter_2/generator --input $RUN/iter_3/extended.jsonl \
    --output $RUN/iter_3/generator
python train.py --model $MODEL --role extender --adapter $RUN/iter_2/extender --input $RUN/iter_3/extended.jsonl \
    --output $RUN/iter_3/extender
# Answers without extension; length demands for all; the Generator that learns to follow them
python generate.py instructions --model $MODEL --seeds prompts/en/seeds.jsonl prompts/zh/seeds.jsonl \
    --dedup-against $RUN/iter_1/instructions.jsonl $RUN/iter_2/instructions.jsonl $RUN/iter_3/instructions.jsonl \
    --count 5000 --output $RUN/final/instructions.jsonl
python generate.py responses --model $MODEL --adapter $RUN/iter_3/generator --input $RUN/final/instructions.jsonl \
    --samples 1 --no-length-bias --output $RUN/final/responses.jsonl
python generate.py constrain --model $MODEL \
    --input $RUN/iter_1/extended.jsonl $RUN/iter_2/extended.jsonl $RUN/iter_3/extended.jsonl $RUN/final/responses.jsonl \
    --output $RUN/final/constrained.jsonl
python train.py --model $MODEL --role generator --input $RUN/final/constrained.jsonl --output $RUN/final/generator
# What the models write
python evaluate.py --model $MODEL --output $RUN/eval/base
python evaluate.py --model $MODEL --adapter $RUN/iter_1/generator --output $RUN/eval/iter_1
python evaluate.py --model $MODEL --adapter $RUN/iter_2/generator --output $RUN/eval/iter_2
python evaluate.py --model $MODEL --adapter $RUN/iter_3/generator --output $RUN/eval/iter_3
python evaluate.py --model $MODEL --adapter $RUN/final/generator --output $RUN/eval/final
