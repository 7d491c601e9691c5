"""The rules that data/README.md states, over every file of data/."""

import json
import re
from collections import defaultdict
from pathlib import Path

import pytest

from stagewise.formats.parsers import parse_conversation, parse_preference, parse_text

DATA = Path(__file__).resolve().parents[2] / "data"
PARSERS = {"pretrain": parse_text, "finetune": parse_conversation, "reward": parse_preference}

# The topics of the validation files, each with the words that would give it away in a training record.
VALIDATION_TOPICS = {
    "aquarium": ("aquarium", "fish tank", "鱼缸"),
    "bicycle": ("bicycle", "bike", "自行车", "单车"),
    "camping": ("camping", "campsite", "tents", "露营", "帐篷"),
    "cast-iron pan": ("cast-iron", "cast iron", "铸铁"),
    "coffee": ("coffee", "咖啡"),
    "curtains": ("curtain", "窗帘"),
    "door hinge": ("hinge", "合页", "铰链"),
    "dumplings": ("dumpling", "饺子", "水饺"),
    "duvet": ("duvet", "羽绒被", "被芯"),
    "hydrangea": ("hydrangea", "绣球"),
    "ironing": ("ironing", "ironed", "steam iron", "熨"),
    "lavender": ("lavender", "薰衣草"),
    "lawn": ("lawn", "草坪"),
    "limescale": ("limescale", "lime scale", "水垢"),
    "mayonnaise": ("mayonnaise", "蛋黄酱"),
    "museum": ("museum", "博物馆"),
    "night train": ("night train", "sleeper train", "bunk", "卧铺"),
    "omelette": ("omelette", "omelet", "煎蛋卷"),
    "orchid": ("orchid", "兰花"),
    "pancakes": ("pancake", "松饼"),
    "passport": ("passport", "护照"),
    "pickles": ("pickle", "pickling", "泡菜", "腌黄瓜"),
    "pizza": ("pizza", "披萨", "比萨"),
    "pumpkin": ("pumpkin", "南瓜"),
    "risotto": ("risotto", "烩饭"),
    "slugs": ("slug", "snail", "蜗牛", "蛞蝓"),
    "sourdough": ("sourdough", "酸面团", "酵种"),
    "strawberries": ("strawberr", "草莓"),
    "suitcase": ("suitcase", "行李箱"),
    "wallpaper": ("wallpaper", "墙纸", "壁纸"),
}


def read(path: Path) -> list[dict]:
    if path.suffix == ".txt":
        return [{"text": path.read_text(encoding="utf-8")}]
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


FILES = sorted(p for p in DATA.rglob("*") if p.suffix in (".jsonl", ".txt"))
RECORDS = [(f"{p.relative_to(DATA)}:{i}", record) for p in FILES for i, record in enumerate(read(p), 1)]


def of(folder: str) -> list[dict]:
    return [record for where, record in RECORDS if where.startswith(folder)]


def texts(record: dict) -> list[str]:
    """Every string that a model sees."""
    turns = [turn["value"] for turn in record.get("conversations", [])]
    return [*turns, *(record[key] for key in ("text", "chosen", "rejected") if key in record)]


def runs(text: str) -> set[str]:
    """Runs of eight English words and of twelve Chinese characters, punctuation and case left out."""
    words = re.findall(r"[a-z0-9]+(?:'[a-z]+)?", text.lower().replace("’", "'"))
    characters = "".join(re.findall(r"[\u4e00-\u9fff]", text))
    eights = {" ".join(words[i : i + 8]) for i in range(len(words) - 7)}
    return eights | {characters[i : i + 12] for i in range(len(characters) - 11)}


def repeated(records: list[tuple[str, dict]]) -> dict[str, set[str]]:
    """Runs that stand in more than one record -> the records' places."""
    seen = defaultdict(set)
    for where, record in records:
        for text in texts(record):
            for run in runs(text):
                seen[run].add(where)
    return {run: places for run, places in seen.items() if len(places) > 1}


def test_no_two_records_share_a_run_of_words():
    assert repeated(RECORDS) == {}


def test_a_repeated_run_would_be_found():
    english = "Knead the dough slowly, rest, and bake the loaf tomorrow"
    pair = [
        ("a:1", {"text": f"So: {english.upper()}!"}),
        ("b:2", {"conversations": [{"from": "human", "value": english}], "chosen": "x", "rejected": "y"}),
        ("c:3", {"text": "先把面和好，醒半小时，如果太干就加水。"}),
        ("d:4", {"text": "请先把面和好醒半小时，如果太干就加"}),
    ]
    assert repeated(pair) == {
        "knead the dough slowly rest and bake the": {"a:1", "b:2"},
        "the dough slowly rest and bake the loaf": {"a:1", "b:2"},
        "dough slowly rest and bake the loaf tomorrow": {"a:1", "b:2"},
        "先把面和好醒半小时如果太": {"c:3", "d:4"},
        "把面和好醒半小时如果太干": {"c:3", "d:4"},
        "面和好醒半小时如果太干就": {"c:3", "d:4"},
        "和好醒半小时如果太干就加": {"c:3", "d:4"},
    }
    assert repeated([pair[0], ("b:2", {"text": "Knead the dough slowly, rest, and fold the loaf tomorrow"})]) == {}


def test_validation_topics_are_the_thirty_listed():
    found = {record["topic"] for where, record in RECORDS if "/validation/" in where}
    assert found == VALIDATION_TOPICS.keys()
    assert len(found) == 30


@pytest.mark.parametrize("topic", VALIDATION_TOPICS)
def test_validation_topics_do_not_occur_in_training(topic):
    words = VALIDATION_TOPICS[topic]
    # An English word counts from its beginning: "bunk" is in "upper bunk", not in "debunk".
    pattern = re.compile("|".join(rf"\b{re.escape(w)}" if w.isascii() else w for w in words))
    training = [(where, record) for where, record in RECORDS if "/train/" in where]
    found = [where for where, record in training if any(pattern.search(text.lower()) for text in texts(record))]
    assert found == []
    assert [where for where, record in training if record.get("topic") == topic] == []
    own = [record for where, record in RECORDS if "/validation/" in where and record["topic"] == topic]
    assert any(pattern.search(text.lower()) for record in own for text in texts(record)), "the words miss the topic"


@pytest.mark.parametrize("place", [str(p.relative_to(DATA)) for p in FILES if p.suffix == ".jsonl"])
def test_every_record_is_of_its_stage_s_form(place):
    parse = PARSERS[place.split("/")[0]]
    for number, record in enumerate(read(DATA / place), 1):
        parsed = parse(record, f"{place}:{number}")
        assert record["topic"] == record["topic"].strip().lower()
        if parse is parse_conversation:
            assert parsed.messages[-1].role == "assistant"
        if parse is parse_preference:
            assert parsed.prompt.messages[-1].role == "user"
            assert parsed.chosen != parsed.rejected
        chinese = [bool(re.search(r"[\u4e00-\u9fff]", text)) for text in texts(record)]
        assert all(chinese) if "chinese" in place else not any(chinese)
        assert all(text == text.strip() and "\ufffd" not in text for text in texts(record))


def test_conversations_are_about_two_hundred_and_a_third_has_several_turns():
    conversations = of("finetune/")
    assert 190 <= len(conversations) <= 230
    several = sum(len(record["conversations"]) > 2 for record in conversations)
    assert 0.28 <= several / len(conversations) <= 0.40


def test_preferences_are_three_hundred_pairs_of_which_a_hundred_are_for_validation():
    assert len(of("reward/train/")) == 200
    assert len(of("reward/validation/")) == 100
    assert len(of("reward/validation/english")) >= 80, "the report judges the reward model on 80 English pairs or more"


def test_prose_is_about_a_hundred_kilobytes():
    assert 90_000 <= sum(len(record["text"].encode()) for record in of("pretrain/")) <= 120_000


@pytest.mark.parametrize("part", ["train", "validation"])
@pytest.mark.parametrize(
    ("language", "measure"), [("english", "characters"), ("english", "words"), ("chinese", "characters")]
)
def test_length_alone_does_not_tell_the_chosen_answer(part, language, measure):
    margins = []
    for record in of(f"reward/{part}/{language}"):
        chosen, rejected = (len(t) if measure == "characters" else len(t.split()) for t in texts(record)[-2:])
        margins.append(chosen - rejected)
    longer = sum(m > 0 for m in margins) + 0.5 * margins.count(0)
    assert 0.40 <= longer / len(margins) <= 0.60
