"""Random tokenizer.json files, made by changes that follow the format: most results are files that
somebody could have meant, and some are not."""

import copy
import json
import random
import unicodedata
from collections.abc import Callable
from typing import Any

from mutations import mutate_bytes, mutate_json
from tokenizer_reference import CONTRACTIONS, bytes_spec
from tokenizers import AddedToken

Spec = dict[str, Any]

# There are few characters, so that tokens overlap: letters, digits, punctuation, marks, spaces of
# one to three bytes, a joiner, and pairs that NFC composes or takes apart.
CHARACTERS = ["a", "b", "a", "b", "<", ">", "1", "_", " ", " ", "\n", "\u00a0", "\u3000"]
CHARACTERS += ["\u0301", "e", "\u00e9", "\u212b", "\u200d", "\u24b6", "\u00bd", "\u6f22"]


def random_string(rng: random.Random, longest: int) -> str:
    return "".join(rng.choices(CHARACTERS, k=rng.randint(1, longest)))


def random_tokens(rng: random.Random) -> list[AddedToken]:
    """Tokens that overlap, some of them tokens of the vocabulary too, with all combinations of
    flags but one: Hugging Face's library ends in a panic where a token of white space with lstrip
    follows one with rstrip."""
    tokens: dict[str, AddedToken] = {}
    for _ in range(rng.randint(1, 12)):
        content = random_string(rng, 4)
        if tokens and rng.random() < 0.5:
            content = rng.choice(list(tokens)) + content
        tokens[content] = AddedToken(
            content,
            special=rng.random() < 0.3,
            normalized=rng.random() < 0.4,
            single_word=rng.random() < 0.3,
            lstrip=not content.isspace() and rng.random() < 0.3,
            rstrip=rng.random() < 0.3,
        )
    # Two whose normalized contents are the same are refused.
    looked_for = {
        (t.normalized, unicodedata.normalize("NFC", t.content) if t.normalized else t.content): t
        for t in tokens.values()
    }
    return list(looked_for.values())


def random_texts(rng: random.Random, contents: list[str], count: int) -> list[str]:
    """Texts made of `contents` and of characters that these have in common."""

    def fragment() -> str:
        return rng.choice(contents) if rng.random() < 0.5 else random_string(rng, 3)

    return ["".join(fragment() for _ in range(rng.randint(0, 12))) for _ in range(count)]


ATOMS = [*"ab1<>'_ ", r"\s", r"\S", r"\r", r"\n", r"\t", r"\p{L}", r"\p{M}", r"\p{N}", "[ab]"]
ATOMS += [r"[^\s\p{L}\p{N}]", r"[\p{L}\p{M}]", r"[^\r\n]", CONTRACTIONS]
UNSUPPORTED = [r"\d", ".", "^", r"\b", "(?<=a)", r"\1", "(*FAIL)", "[a-z]", "\u00e9", r"\p{Lu}"]
UNSUPPORTED += ["a{100}", "a{3,1}", "a**", "(", "[a"]


def random_pattern(rng: random.Random, depth: int = 3) -> str:
    """A regular expression, which is mostly supported and sometimes backtracks a lot."""

    def atom() -> str:
        if rng.random() < 0.01:
            return rng.choice(UNSUPPORTED)
        if depth > 0 and rng.random() < 0.3:
            opening = rng.choice(("(", "(?:", "(?:", "(?=", "(?!"))
            return f"{opening}{random_pattern(rng, depth - 1)})"
        return rng.choice(ATOMS)

    def item() -> str:
        repeated = atom()
        if repeated.startswith(("(?=", "(?!")):
            return repeated  # Oniguruma refuses repeats of these
        repeat = rng.choice(("", "", "", "?", "*", "+", "{2}", "{1,3}", "{2,}", "{0}", "{99}"))
        suffix = rng.choice(("", "", "?", "+")) if repeat in ("?", "*", "+") else ""
        return repeated + repeat + suffix

    def branch() -> str:
        items = [item() for _ in range(rng.randint(0, 3))]
        # What can match nothing is refused, so nearly every branch gets an item that cannot.
        if rng.random() < 0.98:
            items.insert(rng.randint(0, len(items)), rng.choice(ATOMS) + rng.choice(("", "+")))
        return "".join(items)

    if depth > 0 and rng.random() < 0.1:
        repeated, end = rng.choice(ATOMS), rng.choice(ATOMS)
        return f"(?={f'{repeated}*' * rng.randint(1, 4)}{end}){repeated}|\\S"
    return "|".join(branch() for _ in range(rng.randint(1, 4)))


def make_original(rng: random.Random) -> Spec:
    """A file that is accepted."""
    merges = [("a", "b"), ("ab", "ab"), ("Ġ", "a"), ("Ġ", "Ġ"), ("Ã", "©"), ("<", "a"), ("b", "<")]
    return bytes_spec(random_tokens(rng), merges)


def change_pattern(rng: random.Random, spec: Spec) -> None:
    pattern = {"Regex": random_pattern(rng)}
    split = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    spec["pre_tokenizer"]["pretokenizers"][0] = split


def change_added_tokens(rng: random.Random, spec: Spec) -> None:
    """Changes the ids, flags, contents and order of the added tokens."""
    tokens = spec["added_tokens"]
    if rng.random() < 0.5:
        rng.shuffle(tokens)
    for _ in range(rng.randint(0, 2)):
        token, other = rng.choice(tokens), rng.choice(tokens)
        match rng.randrange(6):
            case 0:
                token["id"] = rng.choice((other["id"], token["id"] + 1, 0, 1 << 32, 1 << 63, -1))
            case 1:
                token["id"], other["id"] = other["id"], token["id"]
            case 2:
                flag = rng.choice(("special", "normalized", "single_word", "lstrip", "rstrip"))
                token[flag] = rng.choice((True, False, None, 1))
            case 3:
                token["content"] = rng.choice((other["content"], "", "a" * 3000, "\x00", "Ġ"))
            case 4:
                tokens.append(copy.deepcopy(token))
            case 5:
                tokens.remove(token)
                return


def change_vocabulary(rng: random.Random, spec: Spec) -> None:
    vocab = spec["model"]["vocab"]
    token, other = rng.choice(list(vocab)), rng.choice(list(vocab))
    match rng.randrange(4):
        case 0:
            vocab[token], vocab[other] = vocab[other], vocab[token]
        case 1:
            vocab[token] = rng.choice((len(vocab), -1, 1 << 31, 1 << 32, 0.5, vocab[other]))
        case 2:
            del vocab[token]
        case 3:
            vocab[token + other] = rng.choice((len(vocab), len(vocab) + 1))


def change_merges(rng: random.Random, spec: Spec) -> None:
    model = spec["model"]
    merges, tokens = model["merges"], list(model["vocab"])
    match rng.randrange(6):
        case 0:
            rng.shuffle(merges)
        case 1:
            merges += rng.choices(merges, k=3)
        case 2:
            model["merges"] = [" ".join(pair) for pair in merges]
        case 3:
            pair = rng.choices(tokens, k=2)
            if rng.random() < 0.7 and "".join(pair) not in model["vocab"]:
                ids = {token["content"]: token for token in spec["added_tokens"]}
                model["vocab"]["".join(pair)] = len(model["vocab"])
                for content, token in ids.items():
                    token["id"] = model["vocab"].get(content, token["id"] + 1)
            merges.append(pair)
        case 4:
            model["ignore_merges"] = rng.choice((True, False, None))
        case 5:
            merges.append(
                rng.choice((["a"], ["a", "b", "c"], "a", "a b c", " ", ["", "a"], [1, 2]))
            )


def change_component(rng: random.Random, spec: Spec) -> None:
    """Changes a component to a sequence, a template, or one that other models have."""
    key, items, others = rng.choice(
        (
            ("normalizer", "normalizers", ["NFKC", "Lowercase", "NFC"]),
            ("pre_tokenizer", "pretokenizers", ["Whitespace", "Digits", "ByteLevel"]),
            ("post_processor", "processors", ["TemplateProcessing", "ByteLevel"]),
            ("decoder", "decoders", ["Fuse", "ByteLevel"]),
        )
    )
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    byte_level["use_regex"] = rng.random() < 0.5
    text, special = ({kind: {"id": "A", "type_id": 0}} for kind in ("Sequence", "SpecialToken"))
    single = rng.choice(([text], [text], [special, text], [text, text], []))
    template = {"type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": {}}
    match rng.randrange(5):
        case 0:
            spec[key] = {"type": "Sequence", items: [spec.get(key)]}
        case 1:
            spec[key] = {"type": "Sequence", items: [spec.get(key), {"type": rng.choice(others)}]}
        case 2:
            spec[key] = rng.choice((None, {"type": "Sequence", items: []}, {"type": "Sequence"}))
        case 3:
            spec[key] = byte_level
        case 4:
            spec["post_processor"] = template


def change_training(rng: random.Random, spec: Spec) -> None:
    """Changes a setting that has no influence on ids, whatever its value."""
    spec[rng.choice(("padding", "truncation"))] = rng.choice(({"max_length": 3}, {}, 3, "x"))


CHANGES: list[Callable[[random.Random, Spec], None]] = [
    change_pattern,
    change_pattern,
    change_added_tokens,
    change_added_tokens,
    change_vocabulary,
    change_merges,
    change_component,
    change_training,
]


def random_file(rng: random.Random) -> tuple[bytes, list[str]]:
    """A file that was changed once or several times, and texts that suit it."""
    spec = make_original(rng)
    contents = [token["content"] for token in spec["added_tokens"]]
    texts = [*random_texts(rng, contents, 6), "ab" * 300, "a" * 1000, " " * 1000, "a1 \n" * 200]
    for _ in range(rng.choice((1, 1, 2, 3))):
        try:
            rng.choice(CHANGES)(rng, spec)
        except (KeyError, IndexError, TypeError, AttributeError):
            continue  # an earlier change removed what this one would change
    document = mutate_json(rng, spec) if rng.random() < 0.2 else spec
    data = json.dumps(document, ensure_ascii=rng.random() < 0.5).encode(errors="surrogatepass")
    return mutate_bytes(rng, data) if rng.random() < 0.05 else data, texts
