"""Every folder of prompts/ is a language that works; no code names one; another is added by docs/languages.md alone.

python -m pytest tests/test_languages.py
"""

import ast
import json
import random
import re
import shutil
from pathlib import Path

import pytest

import evaluate
import generate
import run
from lengthen import cli
from lengthen.evaluation.questions import CRITERIA, WINNERS
from lengthen.models import chat
from lengthen.reading import filter_language, read_prompts
from lengthen.records import UserError
from lengthen.text import demands, filters, languages, words
from lengthen.text.languages import codes, language

ROOT = Path(__file__).parents[1]
PLURAL = "es"  # of English words that end in -s
NEW = ("de", "es", "fr", "ja")  # English and Chinese have tests of their own


def rows(name: str, code: str) -> list[dict]:
    return [json.loads(line) for line in (languages.PROMPTS / code / name).read_text("utf-8").splitlines()]


# ---------------------------------------------------------------------------------------------------------------------
# No language in the code


def test_no_code_names_a_language():
    """Neither a code nor a name, as a text of its own or in a path: what is known of a language is in its folder."""
    names = {*codes(), *(language(code).name for code in codes())}
    for path in [*ROOT.glob("*.py"), *(ROOT / "lengthen").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and "\n" not in node.value:
                parts = {node.value, *re.findall(r"prompts/(\w+)", node.value), *node.value.split(".")}
                assert not parts & names or node.value == PLURAL, f"{path.name}, line {node.lineno}: {node.value!r}"


# ---------------------------------------------------------------------------------------------------------------------
# --language


@pytest.mark.parametrize(
    "asked, kept, chosen",
    [
        ("both", "both", "en zh"),
        ("demo", "en", "en"),
        ("all", "all", "de en es fr ja zh"),
        ("de", "de", "de"),
        ("fr,de", "de,fr", "de fr"),
        (" German , français ", "de,fr", "de fr"),
        ("zh,en", "both", "en zh"),
        ("English", "en", "en"),
        ("日本語", "ja", "ja"),
        ("both,ja", "en,ja,zh", "en ja zh"),
    ],
)
def test_any_set_of_languages_can_be_asked_for(asked, kept, chosen):
    assert languages.spelt(asked) == kept
    assert languages.chosen(kept) == tuple(chosen.split())
    args = evaluate.make_parser().parse_args(["answer", "--model", "m", "--output", "o", "--language", asked])
    assert cli.take(args, cli.OutputFlags).language == kept


@pytest.mark.parametrize("asked, named", [("xx", "'xx' is not served: de, en, es"), (",", "no language is named")])
def test_a_language_that_there_is_not_is_one_line(asked, named):
    with pytest.raises(UserError, match=named) as error:
        evaluate.make_parser().parse_args(["answer", "--model", "m", "--output", "o", "--language", asked])
    assert "\n" not in error.value.message


def test_the_loop_reads_the_seeds_of_the_languages_asked_for():
    for flags, want in (
        (["--model", "m"], "en zh"),
        ([], "en"),
        (["--language", "ja,de"], "de ja"),
        (["--model", "m", "--language", "all"], "de en es fr ja zh"),
    ):
        first = run.plan(run.parse_args(flags))[0]
        assert first.settings["seeds"] == [f"prompts/{code}/seeds.jsonl" for code in want.split()]


def test_what_is_left_out_is_said_once(capsys):
    records = [{"language": "en"}, {"language": "de"}, {"language": "de"}, {"language": "ja"}]
    assert filter_language(records, "both") == records[:1]
    assert "--language both leaves out 3 of 4 records, in de, ja" in capsys.readouterr().err
    assert filter_language(records, "all") == records


@pytest.mark.parametrize(
    "name, code",
    [("German", "de"), ("deu", "de"), ("es-MX", "es"), ("fr_CA", "fr"), ("jp", "ja"), ("中文 (简体)", "zh")],
)
def test_records_name_their_language_in_any_way(tmp_path, name, code):
    path = tmp_path / "in.jsonl"
    path.write_text(json.dumps({"prompt": "1 2 3", "language": name}) + "\n", "utf-8")
    assert read_prompts([path])[0]["language"] == code


def test_a_code_within_a_name_is_a_word_of_it():
    assert languages.by_name("Português (de Brasil)") == ""


def test_split_counts_over_several_languages_add_up():
    seeds = [{"language": code} for code in ("de", "de", "en", "ja")]
    for count in range(1, 30):
        split = generate.split_count(count, seeds)
        assert len(split) == count and split == sorted(split)
        assert all(abs(split.count(c) - count * n / 4) < 1 for c, n in (("de", 2), ("en", 1), ("ja", 1)))
        assert generate.split_count(count + 7, seeds, [count])[:count] == split


# ---------------------------------------------------------------------------------------------------------------------
# Detection


def test_every_text_of_a_folder_is_in_its_language():
    wrong = []
    for code in codes():
        for name, field in (("seeds", "prompt"), ("bench_mini", "query")):
            wrong += [r[field] for r in rows(f"{name}.jsonl", code) if words.detect_language(r[field]) != code]
        for name in set(chat.FIELDS) - {"instruct_prefill"}:
            text = re.sub(r"\{.*?\}", "", chat.template(name, code))
            wrong += [(code, name)] * (words.detect_language(text) != code)
    assert wrong == []


def test_halves_and_sentences_of_the_seeds_are_told_apart():
    """In sentences of eight words and more not one in a hundred is taken for another language of the folders."""
    cut, wrong = 0, []
    for code in codes():
        for row in rows("seeds.jsonl", code):
            middle = len(row["prompt"]) // 2
            parts = [row["prompt"][:middle], row["prompt"][middle:], *re.split(r"(?<=[.?!。？])\s*", row["prompt"])]
            for part in (part for part in parts if words.count_words(part) >= 8):
                cut += 1
                wrong += [(code, words.detect_language(part), part)] * (words.detect_language(part) != code)
    assert cut > 400 and len(wrong) <= cut / 100, wrong


@pytest.mark.parametrize(
    "text, code",
    [
        ("Der Hafen ist still und die Fischer flicken ihre Netze, denn der Sturm ist nicht mehr weit.", "de"),
        ("El puerto está tranquilo y los pescadores reparan las redes para salir con la marea.", "es"),
        ("La mer est calme et le vent souffle dans les voiles des bateaux qui rentrent au port.", "fr"),
        ("静かな港で漁師たちは網を繕っていた。誰も嵐のことを話さなかった。", "ja"),
        ("東京都庁第一本庁舎の展望室の営業時間", "ja"),  # a few kana are enough
        ("Il porto è tranquillo e i pescatori riparano le reti, perché la tempesta non è più lontana.", ""),
        ("O porto está tranquilo e os pescadores consertam as redes para sair com a maré.", ""),
    ],
)
def test_neighbours_are_told_apart(text, code):
    assert words.detect_language(text) == code


# ---------------------------------------------------------------------------------------------------------------------
# Words


def test_kana_count_as_ideographs_do():
    assert words.count_words("静かな港で、漁師たちは網を繕っていた。") == 17
    assert words.count_words("コーヒーを3杯飲んだ。") == 10  # the number is a word
    assert words.longen_words("コーヒーを飲む。") == 8  # with its full stop
    assert words.tokens("Python言語の入門") == ["python", *"言語の入門"]


def test_content_words_of_every_language():
    assert evaluate_content("Schreib einen Essay über Leuchttürme.", "Der Leuchtturm steht.", "de") == 1
    assert evaluate_content("Écris un texte sur l’horlogerie.", "L'horloge sonne.", "fr") == 1
    assert evaluate_content("灯台守とコーヒーについて書いてください。", "灯台守はコーヒーを飲んだ。", "ja") == 1
    assert evaluate_content("灯台守について書いてください。", "猫が眠る。", "ja") == 0


def evaluate_content(query: str, answer: str, code: str) -> float | None:
    from lengthen.evaluation.measures import content_words

    return content_words(query, answer, code)


# ---------------------------------------------------------------------------------------------------------------------
# Length demands

STATED = {
    ("de", ("about", 3000, 3000)): [
        "Schreib einen Aufsatz von etwa 3000 Wörtern.",
        "Schreib ungefähr dreitausend Wörter.",
        "Ein 3.000-Wörter-Essay über das Meer, bitte.",
        "Der Text soll rund 3 000 Wörter umfassen.",
        "Verfasse einen Bericht mit ca. 3000 Worten.",
    ],
    ("de", ("range", 2000, 3000)): [
        "Schreib 2000 bis 3000 Wörter über das Meer.",
        "Der Text soll zwischen 2.000 und 3.000 Wörter lang sein.",
        "Länge: 2000–3000 Wörter.",
        "Schreib zwischen zweitausend und dreitausend Wörter.",
        "Mindestens 2000, höchstens 3000 Wörter.",
    ],
    ("de", ("above", 2500, -1)): [
        "Schreib mehr als 2500 Wörter.",
        "Der Aufsatz soll mindestens zweitausendfünfhundert Wörter haben.",
        "Schreib nicht weniger als 2.500 Wörter.",
        "Der Text muss 2500 Wörter überschreiten.",
        "Schreib 2500 Wörter oder mehr.",
    ],
    ("de", ("below", -1, 800)): [
        "Schreib weniger als 800 Wörter.",
        "Höchstens achthundert Wörter, bitte.",
        "Der Brief soll 800 Wörter nicht überschreiten.",
        "Bis zu 800 Wörter sind erlaubt.",
        "Schreib nicht mehr als 800 Wörter.",
    ],
    ("es", ("about", 3000, 3000)): [
        "Escribe un ensayo de unas 3000 palabras.",
        "Escribe aproximadamente tres mil palabras.",
        "Un relato de 3.000 palabras sobre el mar.",
        "Escribe alrededor de 3 mil palabras.",
    ],
    ("es", ("range", 2000, 3000)): [
        "Escribe entre 2000 y 3000 palabras.",
        "De 2.000 a 3.000 palabras, por favor.",
        "Escribe entre dos mil y tres mil palabras.",
        "Extensión: 2000-3000 palabras.",
    ],
    ("es", ("above", 2500, -1)): [
        "Escribe más de 2500 palabras.",
        "Debe tener al menos dos mil quinientas palabras.",
        "Que no tenga menos de 2.500 palabras.",
        "El texto debe superar las 2500 palabras.",
        "Escribe 2500 palabras o más.",
    ],
    ("es", ("below", -1, 800)): [
        "Escribe menos de 800 palabras.",
        "En ochocientas palabras como máximo.",
        "Sin superar las 800 palabras.",
        "No más de 800 palabras.",
        "Que no exceda de 800 palabras.",
    ],
    ("fr", ("about", 3000, 3000)): [
        "Écris un essai d’environ 3000 mots.",
        "Écris à peu près trois mille mots.",
        "Un récit de 3 000 mots sur la mer.",
        "Rédige un texte de 3 milliers de mots.",
    ],
    ("fr", ("range", 2000, 3000)): [
        "Écris entre 2000 et 3000 mots.",
        "De 2 000 à 3 000 mots, s’il te plaît.",
        "Écris entre deux mille et trois mille mots.",
        "Longueur : 2000-3000 mots.",
    ],
    ("fr", ("above", 2500, -1)): [
        "Écris plus de 2500 mots.",
        "Il doit compter au moins deux mille cinq cents mots.",
        "Pas moins de 2 500 mots.",
        "Le texte doit dépasser 2500 mots.",
        "Écris 2500 mots ou plus.",
    ],
    ("fr", ("below", -1, 800)): [
        "Écris moins de 800 mots.",
        "En huit cents mots au maximum.",
        "Sans dépasser 800 mots.",
        "Le texte ne doit pas excéder 800 mots.",
        "Au plus 800 mots.",
    ],
    ("ja", ("about", 3000, 3000)): [
        "約3000字で書いてください。",
        "3,000字程度の随筆を書いてください。",
        "三千字ほどで述べてください。",
        "文字数は3000文字前後とします。",
        "３０００字の物語を書いてください。",
    ],
    ("ja", ("range", 2000, 3000)): [
        "2000字から3000字で書いてください。",
        "2000～3000字で述べてください。",
        "2000字以上3000字以内で書いてください。",
        "二千字から三千字の随筆を書いてください。",
    ],
    ("ja", ("above", 2500, -1)): [
        "2500字以上で書いてください。",
        "少なくとも二千五百字は書いてください。",
        "2500字を超える文章にしてください。",
        "2500字を下回らないようにしてください。",
    ],
    ("ja", ("below", -1, 800)): [
        "800字以内で書いてください。",
        "八百字以下でまとめてください。",
        "800字を超えないでください。",
        "最大でも800文字としてください。",
        "800字未満で答えてください。",
    ],
}


@pytest.mark.parametrize("code, demand, text", [(*key, text) for key, texts in STATED.items() for text in texts])
def test_demands_are_found_as_people_word_them(code, demand, text):
    assert demands.stated_demands(text, code) == [demand]


@pytest.mark.parametrize(
    "code, text",
    [
        ("de", "Schreib einen Essay über das Meer und die 3000 Inseln vor der Küste."),
        ("de", "Sag in zwei Worten, wer gewann, und erzähl von den 1000 Zeichen an der Wand."),
        ("es", "Explica en dos palabras quién ganó y describe las 3000 islas."),
        ("fr", "Choisis cinq mots-clés et décris les 3000 îles."),
        ("fr", "Dis en un mot qui a gagné la course de 3 000 mètres."),
        ("ja", "400字詰め原稿用紙に二百人の名前を書いてください。"),
        ("ja", "一字一句を大切に、千年前の町を描いてください。"),
        ("ja", "数千字の碑文と何百字もの落書きを描いてください。"),
        ("de", "Der Begriff einsieben: Wörter durch ein Sieb schütten."),
    ],
)
def test_other_numbers_are_no_demands(code, text):
    assert demands.stated_demands(text, code) == []


@pytest.mark.parametrize(
    "code, text, words",
    [
        ("de", "3\u2009000 Wörter", 3000),
        ("de", "3'000 Wörter", 3000),
        ("de", "einsieben, dann 500 Wörter", 500),
        ("es", "Texto 3\t500 palabras", 500),
        ("fr", "Environ 3\u2009000 mots", 3000),
        ("fr", "Chapitre 3\n500 mots", 500),
    ],
)
def test_only_blanks_of_a_line_group_digits(code, text, words):
    assert demands.stated_demands(text, code) == [("about", words, words)]


@pytest.mark.parametrize(
    "code, text, number",
    [
        ("de", "dreitausend", 3000),
        ("de", "zweitausendfünfhundert", 2500),
        ("de", "fünfundzwanzigtausend", 25000),
        ("de", "einundzwanzig", 21),
        ("de", "3.500", 3500),
        ("de", "2,5 tausend", 2500),
        ("es", "treinta y cinco mil", 35000),
        ("es", "dos mil quinientas", 2500),
        ("es", "ciento cincuenta", 150),
        ("es", "mil", 1000),
        ("fr", "quatre-vingt-dix", 90),
        ("fr", "deux mille cinq cents", 2500),
        ("fr", "soixante et onze", 71),
        ("fr", "dix-sept", 17),
        ("fr", "1\u202f500", 1500),
        ("ja", "二千五百", 2500),
        ("ja", "千五百", 1500),
        ("ja", "1万2千", None),
        ("ja", "三千", 3000),
        ("de", "viele", None),
        ("es", "muchas", None),
        ("fr", "et", None),
    ],
)
def test_number_words(code, text, number):
    if number is None:
        with pytest.raises(ValueError, match=re.escape(repr(text))):
            demands.read_number(text, code)
    else:
        assert demands.read_number(text, code) == number


@pytest.mark.parametrize("code", codes())
def test_a_demand_that_is_made_reads_back_alone_and_in_a_sentence(code):
    rng, kinds = random.Random(3), set()
    for _ in range(600):
        made = demands.make_demand(rng.randrange(150, 8000), code, rng, low=100, high=9000, steps=(50, 500))
        assert made is not None
        constraint, *demand = made
        assert demands.parse_demand(constraint, code) == tuple(demand), constraint
        record = {"prompt": rows("seeds.jsonl", code)[0]["prompt"], "language": code, "constraint": constraint}
        record |= dict(zip(("type", "min_words", "max_words"), demand, strict=True))
        assert generate.append_demand(record, "demand")[1] == "", constraint
        kinds.add(demand[0])
    assert kinds == set(demands.TYPES)
    asked = language(code).demand.at_least.format(words=700)
    assert demands.stated_demands(asked, code) == [("above", 700, -1)]


@pytest.mark.parametrize("code", codes())
def test_the_judges_are_shown_the_form_of_their_reply(code):
    """The keys are the same in every language: what reads them knows no language."""
    for kind, wanted in (("quality", CRITERIA), ("compare", WINNERS)):
        text = chat.fill(kind, code, **dict.fromkeys(chat.FIELDS[kind], "x"))
        assert [word for word in wanted if f'"{word}"' not in text] == []


@pytest.mark.parametrize("code", codes())
def test_the_list_of_instructions_ends_before_the_fourth(code):
    """The template ends with the third number, alone; the stop string is the same with a 4."""
    filled = chat.fill("instruct_prefill", code, example_1="AAA", example_2="BBB")
    last = filled.splitlines()[-1]
    [stop] = generate.item_ends([{"prompt": "a\n\nb"}, {"prompt": "c"}], code)
    assert "3" in last and stop == "\n" + last.replace("3", "4").rstrip(":： ")
    assert filled.count(stop.replace("4", "1").strip()) == filled.count(stop.replace("4", "2").strip()) == 1
    label = last.replace("3", "5")
    assert generate.clean_instruction(f"{label} Xyz abc", code) == "Xyz abc"


# ---------------------------------------------------------------------------------------------------------------------
# Answers

BODIES = {
    "de": "Die Sonne ging über dem stillen Hafen auf. Fischer flickten ihre Netze, und Möwen schrien über den Masten."
    "\n\nNiemand wusste, was der Tag bringen würde. Der alte Kapitän hatte viele solche Morgen erlebt.",
    "es": "El sol salió sobre el puerto en calma. Los pescadores remendaban las redes y las gaviotas chillaban sobre"
    " los mástiles.\n\nNadie sabía qué traería el día. El viejo capitán había visto muchas mañanas como aquella.",
    "fr": "Le soleil se levait sur le port tranquille. Les pêcheurs réparaient leurs filets et les mouettes criaient"
    " au-dessus des mâts.\n\nPersonne ne savait ce que la journée apporterait. Le vieux capitaine souriait.",
    "ja": "静かな港に朝日がのぼった。漁師たちは網を繕い、かもめが帆柱の上で鳴いていた。"
    "\n\nその日に何が起こるのか、だれも知らなかった。老いた船長は、こんな朝を何度も見てきた。",
}
OPENINGS = {
    "de": ["Gerne! ", "Natürlich! Hier ist der Artikel:\n\n", "Hier ist eine erweiterte Version des Textes:\n\n"]
    + ["Ich habe den Text überarbeitet und ausgebaut.\n\n", "Vielen Dank für deine Gliederung. ", "Sure! "]
    + ["Als KI kann ich nicht reisen. ", "Ich freue mich, dir helfen zu können. "],
    "es": ["¡Claro! ", "¡Por supuesto! Aquí tienes el artículo:\n\n", "Aquí tienes una versión ampliada del texto.\n\n"]
    + ["He ampliado el texto como pediste.\n\n", "Gracias por compartir el esquema. ", "Here is the full text:\n\n"]
    + ["Como modelo de lenguaje, no tengo recuerdos. ", "Me complace compartir este texto. "],
    "fr": ["Bien sûr ! ", "Avec plaisir ! Voici le texte complet :\n\n", "Voici une version enrichie du texte.\n\n"]
    + ["J’ai développé votre texte en détail.\n\n", "Merci pour votre plan. ", "Certainly! "]
    + ["Je serais heureux de pouvoir vous aider. ", "Je suis ravie de partager cette histoire. "],
    "ja": ["承知しました。", "はい、以下は書き直した文章です。\n\n", "以下が本文です。\n\n", "もちろんです！\n"]
    + ["それでは、物語を書きます。\n\n", "Sure! Here is the story:\n\n"],
}
CLOSINGS = {
    "de": [
        "\n\nIch hoffe, das hilft dir weiter!",
        "\n\nLass mich wissen, ob du Änderungen möchtest.",
        "\n\n(512 Wörter)",
    ]
    + ["\n\nWortzahl: 532", "\n\n(Hinweis: Alle Namen sind erfunden.)", "\n\nMöchtest du, dass ich weiterschreibe?"]
    + ["\n\nSoll ich den Text noch kürzen?", "\n\nMöchten Sie, dass ich das Ende ändere?"],
    "es": ["\n\nEspero que este texto te resulte útil.", "\n\nSi necesitas algo más, no dudes en decírmelo."]
    + ["\n\n(512 palabras)", "\n\nNota: he inventado los nombres.", "\n\n¿Te gustaría que añada otro capítulo?"]
    + ["\n\n¿Deseas que te lo cambie?"],
    "fr": ["\n\nJ’espère que ce texte vous plaira.", "\n\nN’hésitez pas à me demander des modifications."]
    + ["\n\n(512 mots)", "\n\nNote : ce texte est une fiction.", "\n\nSouhaitez-vous que j’ajoute un chapitre ?"]
    + ["\n\nVoulez-vous que je le modifie ?"],
    "ja": ["\n\nこの文章がお役に立てば幸いです。", "\n\nご要望があれば、お気軽にお知らせください。", "\n\n（約1200字）"]
    + ["\n\n文字数：1200字", "（注：この物語は創作です。）", "\n\nいかがでしょうか。"]
    + ["\n\nもし修正のご希望があれば、お知らせください。", "\n\n他にご質問がありましたら、ご連絡ください。"],
}


@pytest.mark.parametrize("code", NEW)
def test_plain_answers_are_accepted_as_they_are(code):
    assert filters.clean_answer(BODIES[code], "eos", code) == (BODIES[code], "")
    for other in {*NEW} - {code}:
        assert filters.clean_answer(BODIES[code], "eos", other)[1] == "language"
    mixed = BODIES[code] + "\n\n" + BODIES["fr" if code != "fr" else "de"]
    assert filters.clean_answer(mixed, "eos", code)[1] == "language"


@pytest.mark.parametrize("code, chatter", [(code, phrase) for code, some in OPENINGS.items() for phrase in some])
def test_a_chatty_opening_goes(code, chatter):
    assert filters.clean_answer(chatter + BODIES[code], "eos", code) == (BODIES[code], "")


@pytest.mark.parametrize("code, chatter", [(code, phrase) for code, some in CLOSINGS.items() for phrase in some])
def test_a_chatty_closing_goes(code, chatter):
    assert filters.clean_answer(BODIES[code] + chatter, "eos", code) == (BODIES[code], "")


@pytest.mark.parametrize(
    "code, text",
    [
        ("de", "Natürlich hatte der Krieg viele Ursachen. Drei davon kennt jeder."),
        ("de", "Hier ist der Hafen. Hier sind die Boote und die Netze."),
        ("de", "Ich hoffe, es regnet morgen. Als Kind habe ich den Regen gehasst."),
        ("de", "Danke für alles, was ihr getan habt. Viel Spaß beim Backen!"),
        ("es", "Claro que la guerra tuvo muchas causas. Todos conocen tres de ellas."),
        ("es", "Aquí está el puerto. Aquí están los barcos y las redes."),
        ("es", "Espero que llueva mañana. Gracias por todo lo que habéis hecho."),
        ("fr", "Bien sûr, la guerre eut plusieurs causes. Chacun en connaît trois."),
        ("fr", "Voici le port. Voici les bateaux et les filets."),
        ("fr", "J’espère qu’il pleuvra demain. Merci pour tout ce que vous avez fait."),
        ("ja", "もちろん、戦争には多くの原因があった。だれもがそのうちの三つを知っている。"),
        ("ja", "以下の話は、ある港町で起きた出来事である。"),
        ("ja", "また会える日を楽しみにしています。皆さま、本当にありがとうございました。"),
    ],
)
def test_ordinary_sentences_are_not_chatter(code, text):
    assert filters.clean_answer(text, "eos", code) == (text, "")
    assert filters.has_chatter(BODIES[code] + "\n\n" + text, code) is False


@pytest.mark.parametrize(
    "code, first",
    [
        ("de", "Als künstliche Intelligenz in die Fabriken kam, verloren viele ihre Arbeit."),
        ("de", "Vielen Dank für die Aufgabe, die Sie mir anvertraut haben."),
        ("de", "Ich freue mich, Sie heute Abend begrüßen zu dürfen."),
        ("es", "Como inteligencia artificial entendemos hoy muchas cosas."),
        ("es", "Me complace presentar a nuestra invitada de hoy."),
        ("fr", "Je suis heureux de vous accueillir ce soir."),
    ],
)
def test_first_sentences_of_texts_and_speeches_stay(code, first):
    text = f"{first} {BODIES[code]}"
    assert filters.clean_answer(text, "eos", code) == (text, "")


@pytest.mark.parametrize(
    "code, last",
    [
        ("de", "Möchten Sie in einer Stadt ohne Bäume leben?"),
        ("de", "Soll ich gehen oder bleiben?"),
        ("es", "¿Quieres que bailemos una vez más?"),
        ("es", "¿Quieres que hagamos una fiesta?"),
        ("fr", "N’hésitez pas à nous rendre visite cet été."),
        ("fr", "Voulez-vous que je vous dise la vérité ?"),
        ("ja", "もし明日世界が終わるなら、どうか私に真実を教えてください。"),
    ],
)
def test_last_sentences_of_texts_and_letters_stay(code, last):
    text = f"{BODIES[code]}\n\n{last}"
    assert filters.clean_answer(text, "eos", code) == (text, "")


def test_a_letter_may_invite_its_reader():
    assert not filters.has_chatter("N’hésitez pas à me rendre visite.", "fr")
    assert filters.has_chatter("N’hésitez pas à me dire ce que vous en pensez.", "fr")


@pytest.mark.parametrize(
    "code, line",
    [
        ("de", "Hier ist eine überarbeitete Fassung des zweiten Teils:"),
        ("de", "Als KI-Sprachmodell habe ich keine Erinnerungen."),
        ("es", "Aquí tienes una versión ampliada de la segunda parte:"),
        ("es", "Como modelo de lenguaje, no tengo recuerdos."),
        ("fr", "Voici une version enrichie de la deuxième partie :"),
        ("fr", "En tant que modèle de langage, je n’ai pas de souvenirs."),
        ("ja", "以下は書き直した後半の文章です。"),
        ("ja", "AIとして、私には思い出がありません。"),
    ],
)
def test_chatter_inside_rejects(code, line):
    first, second = BODIES[code].split("\n\n")
    assert filters.clean_answer(f"{first}\n\n{line}\n\n{second}", "eos", code)[1] == "chatter"


@pytest.mark.parametrize(
    "code, end",
    [
        ("de", "\n\nMit freundlichen Grüßen\nAnna Berg"),
        ("de", "\n\nLiebe Grüße, Oma"),
        ("de", "\n\nENDE"),
        ("de", "\n\nHamburg, den 4. März 2026"),
        ("de", " „Es ist gut.“"),
        ("de", " »Komm nach Hause.«"),
        ("es", "\n\nAtentamente,\nAna Ruiz"),
        ("es", "\n\nUn abrazo,\nTu hermana"),
        ("es", "\n\nFIN"),
        ("es", "\n\nMadrid, 4 de marzo de 2026"),
        ("es", " «Ya está bien.»"),
        ("fr", "\n\nCordialement,\nAnne Berger"),
        ("fr", "\n\nLe 4 mars 2026"),
        ("fr", "\n\nFIN"),
        ("fr", " « C’est bien. »"),
        ("fr", " «\u00a0Rentre à la maison\u00a0!\u00a0»"),
        ("ja", "\n\n敬具\n山田花子"),
        ("ja", "\n\n（完）"),
        ("ja", "\n\n令和八年三月四日"),
        ("ja", "「もういいよ。」"),
        ("de", "\n\nDeine Oma"),
        ("de", " Das kostet 20 Fr."),
        ("es", "\n\nTu abuela"),
        ("es", " Gracias a Uds."),
        ("fr", "\n\nTa grand-mère"),
        ("fr", " Elle mesure 300 m."),
        ("fr", " Une vis de 12 mm."),
        ("ja", "\n\n山田太郎より"),
        ("ja", "\n\n「それじゃ、行ってくるよ」"),
        ("ja", "\n\n- 毎朝歩くこと\n- 軽いもの"),
    ],
)
def test_texts_end_in_the_ways_of_their_language(code, end):
    assert filters.is_complete(BODIES[code] + end, code)


@pytest.mark.parametrize(
    "code, end",
    [
        ("de", " Der Kapitän ging zu seinem Boot und"),
        ("de", " Er sah z. B."),
        ("es", " El capitán volvió a su barco y"),
        ("es", " Vivía con la"),
        ("fr", " Le capitaine regagna son bateau et"),
        ("fr", " Il pensait à la"),
        ("ja", "船長は自分の船へ戻り、"),
        ("ja", "船長が見つめていたのは、遠くの"),
        ("de", " Sie traf Fr."),
        ("de", "\n\nihre netze"),
        ("fr", " Il écrivit à M."),
        ("ja", "\n\n船長は「海"),
        ("ja", "\n\n「船長は、」"),
        ("ja", "\n\n- 朝の海と"),
    ],
)
def test_texts_that_were_cut_are_not_complete(code, end):
    assert not filters.is_complete(BODIES[code] + end, code)


@pytest.mark.parametrize("code", codes())
def test_a_sentence_over_and_over_is_a_loop(code):
    sentence = rows("seeds.jsonl", code)[0]["prompt"]
    assert filters.is_loop(sentence * 3, code)
    assert not filters.is_loop("\n".join(row["prompt"] for row in rows("seeds.jsonl", code)), code)


def test_the_outline_of_the_template_is_the_outline_of_the_filter():
    import extend

    for code in codes():
        pattern = extend._outline(language(code))
        assert pattern.search(chat.template("extend", code)) or code == "fr"  # "plan" is an everyday word there


# ---------------------------------------------------------------------------------------------------------------------
# A damaged folder


@pytest.mark.parametrize(
    "change, message",
    [
        (("'no': 'No'", "'no': No"), "no: False is not a text: put it in quotes"),
        (("ngram: 10", "ngram: ten"), "ngram: 'ten' is not a whole number"),
        (("ngram: 10", "ngrams: 10"), "the key ngrams is not known"),
        (("  above: more than {a} words\n", ""), "the key demand.above is missing"),
        (("more than {a} words", "more than {b} words"), "demand.above: .* must have the fields {a}"),
        (("'\\boutline\\b'", "'\\boutline('"), "outline: not a regular expression"),
        (("    - above: '\\+|plus", "    - over: '\\+|plus"), "demand.unit_kinds: .* is not one of about, range"),
        (("name: English", "name: 'English"), "language.yaml, line "),
        (("everywhere: true", "everywhere: 1"), "everywhere: 1 is neither true nor false"),
        (("names: eng", "names: eng zho"), "the name 'zho' is also that of"),
        (("name: English", "name: Eng\x01lish"), "special characters are not allowed"),
        (("name: English", "name: 2020-01-99"), "day"),
    ],
)
def test_a_mistake_in_language_yaml_is_one_line_with_file_and_key(tmp_path, monkeypatch, change, message):
    shutil.copytree(languages.PROMPTS, tmp_path / "prompts")
    path = tmp_path / "prompts" / "en" / "language.yaml"
    text = path.read_text("utf-8")
    assert change[0] in text
    path.write_text(text.replace(*change), "utf-8")
    monkeypatch.setattr(languages, "PROMPTS", tmp_path / "prompts")
    with pytest.raises(UserError, match=message) as error:
        languages.spelt("all")
    assert "language.yaml" in error.value.message and "\n" not in error.value.message


def test_a_folder_without_its_file_is_named(tmp_path, monkeypatch):
    shutil.copytree(languages.PROMPTS, tmp_path / "prompts")
    (tmp_path / "prompts" / "it").mkdir()
    monkeypatch.setattr(languages, "PROMPTS", tmp_path / "prompts")
    with pytest.raises(UserError, match="it/language.yaml is missing"):
        languages.spelt("all")
    assert languages.spelt("en") == "en" and languages.chosen("en") == ("en",)  # its own file is read, no other


def test_a_fork_may_have_any_folders_but_needs_one(tmp_path, monkeypatch):
    prompts = tmp_path / "prompts"
    shutil.copytree(languages.PROMPTS / "de", prompts / "de")
    shutil.copytree(languages.PROMPTS / "fr", prompts / "fr")
    (prompts / "old").write_text("a file", "utf-8")
    monkeypatch.setattr(languages, "PROMPTS", prompts)
    assert languages.codes() == ("de", "fr")
    assert run.plan(run.parse_args([]))[0].settings["seeds"] == ["prompts/de/seeds.jsonl", "prompts/fr/seeds.jsonl"]
    monkeypatch.setattr(languages, "PROMPTS", tmp_path / "elsewhere")
    with pytest.raises(UserError, match="elsewhere has no language"):
        languages.spelt("en")


# ---------------------------------------------------------------------------------------------------------------------
# The page


@pytest.fixture
def italian(tmp_path, monkeypatch) -> str:
    """prompts/ with a folder more, made of what docs/languages.md shows and of nothing else."""
    shutil.copytree(languages.PROMPTS, tmp_path / "prompts")
    page = (ROOT / "docs" / "languages.md").read_text("utf-8")
    files = re.findall(r"^`it/([\w.]+)`\n```\w*\n(.*?)^```$", page, re.S | re.M)
    folder = tmp_path / "prompts" / "it"
    folder.mkdir()
    for name, text in files:
        (folder / name).write_text(text, "utf-8")
    assert {f"{name}.md" for name in chat.FIELDS} | {"language.yaml", "seeds.jsonl"} <= {name for name, _ in files}
    monkeypatch.setattr(languages, "PROMPTS", tmp_path / "prompts")
    chat.template.cache_clear()
    yield "it"
    chat.template.cache_clear()


def test_a_language_is_added_by_the_page_alone(italian, tmp_path):
    assert languages.codes() == ("de", "en", "es", "fr", "it", "ja", "zh")
    assert languages.spelt("italiano") == languages.by_name("it-IT") == "it"
    # The loop finds its seeds, self-instruct its examples, the evaluation its queries.
    assert run.plan(run.parse_args(["--language", "it"]))[0].settings["seeds"] == ["prompts/it/seeds.jsonl"]
    seeds = read_prompts([languages.PROMPTS / "it" / "seeds.jsonl"], source="seed")
    assert len(generate.draw_shots("a", "it", seeds)) == 2 and generate.split_count(3, seeds) == ["it"] * 3
    assert generate.item_ends(seeds, "it") == ("\nIstruzione 4", "\n\n")
    assert generate.examine_instruction("3. " + seeds[0]["prompt"], "eos", "it") == (seeds[0]["prompt"], "")
    queries = [row for path in evaluate.find_benchmark("mini", "it") for row in evaluate.read_rows(path)]
    assert {row["type"] for row in queries} == set(demands.TYPES) and evaluate.contradictions(queries) == []
    # A record without a language is known by its text, and its demands are made, written and read.
    for row in [*seeds, *({"prompt": row["query"]} for row in queries)]:
        assert words.detect_language(row["prompt"]) == "it"
    rng = random.Random(4)
    for _ in range(300):
        constraint, *demand = demands.make_demand(
            rng.randrange(200, 8000), "it", rng, low=100, high=9000, steps=(50, 500)
        )
        record = {"prompt": seeds[0]["prompt"], "language": "it", "constraint": constraint}
        record |= dict(zip(("type", "min_words", "max_words"), demand, strict=True))
        assert generate.append_demand(record, "demand")[1] == "", constraint
    assert demands.stated_demands("Scrivi almeno duemilacinquecento parole.", "it") == [("above", 2500, -1)]
    # Answers are judged by its words.
    text = "Il sole sorgeva sul porto. I pescatori riparavano le reti e i gabbiani gridavano.\n\nNessuno parlava."
    assert filters.clean_answer("Certo! Ecco il racconto:\n\n" + text, "eos", "it") == (text, "")
    assert filters.clean_answer(text + "\n\nSpero che questo testo ti sia utile.", "eos", "it") == (text, "")
    assert filters.clean_answer(text + " Poi arrivò il", "eos", "it")[1] == "ending"
    assert filters.clean_answer(text + "\n\nCordiali saluti,\nAnna Ricci", "eos", "it")[1] == ""
    assert filters.clean_answer(BODIES["es"], "eos", "it")[1] == "language"
    chat.template_hashes("it", *chat.FIELDS)


def test_a_folder_more_changes_no_settings_of_a_run_that_goes_on(italian, tmp_path):
    from lengthen.jobs import check_settings

    before = {"language": "both", "templates": {"judge.en.md": "a", "judge.zh.md": "b"}, "quality.en.md": "c"}
    now = {"language": "both", "templates": {"judge.en.md": "a"}, "quality.en.md": "c", "quality.it.md": "d"}
    assert check_settings({"settings": before}, now, tmp_path / "x.jsonl") == {}
    with pytest.raises(UserError, match="templates"):
        check_settings({"settings": before}, {**now, "templates": {"judge.en.md": "z"}}, tmp_path / "x.jsonl")


def test_an_input_under_a_new_name_is_the_same_input(tmp_path):
    from lengthen.jobs import check_settings

    here = {"inputs": {"en/seeds.jsonl": "a1", "zh/seeds.jsonl": "b2"}}
    old = {"inputs": {"prompts/seeds.en.jsonl": "a1", "prompts/seeds.zh.jsonl": "b2"}}
    assert check_settings({"settings": old}, here, tmp_path / "x.jsonl") == {}
    with pytest.raises(UserError, match="was made with inputs"):
        check_settings({"settings": {"inputs": {**old["inputs"], "prompts/seeds.zh.jsonl": "c3"}}}, here, tmp_path)


REFUSALS = {
    "en": [
        "I'm afraid I am unable to provide the requested text. Please ask for something else.",
        "I’m so sorry to hear that, but as an AI designed to help, I have no feelings about it.",
        "I'm sorry, but I cannot assist with that request.",
        "Unfortunately, I can't write this story for you.",
        "As an AI language model, I cannot write this. Please ask something else.",
        "Thank you for asking. I apologize, but I am not able to create such a text.",
    ],
    "zh": ["很抱歉，我无法提供您要求的文章。", "作为一个人工智能语言模型，我不能撰写这篇文章。"],
    "de": ["Es tut mir leid, aber ich kann diesen Text nicht schreiben.", "Leider kann ich dir dabei nicht helfen."],
    "es": ["Lo siento, pero no puedo escribir ese texto.", "No puedo ayudarte con esta solicitud."],
    "fr": ["Je suis désolé, mais je ne peux pas vous aider.", "Désolée, je ne peux pas rédiger ce texte."],
    "ja": [
        "申し訳ありませんが、その文章を作成することはできません。",
        "残念ながら、ご要望にはお応えすることができません。",
    ],
}


@pytest.mark.parametrize("code, text", [(code, text) for code, some in REFUSALS.items() for text in some])
def test_a_refusal_is_no_answer(code, text):
    assert filters.clean_answer(text, "eos", code)[1] == "refusal"


@pytest.mark.parametrize(
    "code, text",
    [
        ("en", "Dear Anna, I am sorry that I cannot come to the harbour this year."),
        ("en", "“I’m sorry, but I can’t help you,” she said, and closed the door."),
        ("en", "I am unable to forget that summer by the sea."),
        ("en", "I cannot write a word without thinking of you."),
        ("en", "I am afraid of the sea, and so was my father."),
        ("de", "Leider kann ich diesen Sommer nicht vergessen."),
        ("de", "„Es tut mir leid, aber ich kann dir nicht helfen“, sagte sie."),
        ("es", "No puedo olvidar aquel verano junto al mar."),
        ("fr", "Je ne peux pas oublier cet été au bord de la mer."),
        ("ja", "申し訳ありませんと、彼女は小さな声で言った。"),
        ("zh", "我无法忘记那个夏天的海边。"),
    ],
)
def test_who_cannot_do_something_else_is_no_refusal(code, text):
    assert not filters.is_refusal(text, code)
