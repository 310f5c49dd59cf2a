"""The command line: the answer on stdout, all else on stderr, one line and 2 for wrong input."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import warnings

import pytest
import sentencepiece
import tokenizers
import torch
from files import ROOT, edit_json, shards_of, tensors_of, write_tensors

import tools.chat
import tools.generate
from checkpoints import load_model, load_tokenizer
from modeling import generate
from tools.__main__ import COMMANDS, main, make_parser
from tools.corpus import train_vocabulary
from tools.make_tiny import CONFIGS, SAMPLE_TEXT

PROMPT = "Once upon a time"
FIGURES = {
    *("prompt", "text", "ids", "total_parameters", "active_parameters", "prompt_tokens"),
    *("prompt_tokens_per_second", "generated_tokens", "generation_tokens_per_second"),
    *("cache_bytes_per_token", "cache_constant_bytes", "plain_attention_cache_bytes_per_token"),
    *("forwards", "forwards_saved", "drafted_tokens", "accepted_tokens", "mean_accepted_length"),
    *("drafting_seconds", "verifying_seconds"),
}


@pytest.fixture(autouse=True)
def _own_warnings(monkeypatch):
    """`main` shows warnings its own way; give the way of the tests back afterwards."""
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)


@pytest.fixture
def command(capsys):
    """Run the program in this process: (exit code, stdout, stderr)."""

    def run(*arguments):
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as exit_:  # how argparse ends
            code = exit_.code
        return code, *capsys.readouterr()

    return run


def generated(path, *more):
    return ("generate", "--model", path, "--max-new-tokens", "12", *more)


def in_a_process(*arguments, **options):
    return subprocess.Popen(
        [sys.executable, "-m", "tools", *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        **options,
    )


def refused(result):
    """The one line that says what is wrong."""
    code, out, err = result
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize("family", sorted(CONFIGS))
def test_generate_prints_the_prompt_and_its_continuation(pristine, command, family):
    path = pristine(family)
    code, out, err = command(*generated(path, "--prompt", PROMPT))
    tokenizer, model = load_tokenizer(path), load_model(path, progress=False)
    prompt_ids = tokenizer.encode(PROMPT)
    ids = list(generate(model, prompt_ids, 12, stop_ids=tokenizer.stop_ids))
    assert code == 0
    assert out == tokenizer.decode([*prompt_ids, *ids]) + "\n"
    assert out.startswith(PROMPT)
    assert "parameters" in err
    assert "Traceback" not in err


def test_the_prompt_comes_from_a_flag_a_file_or_stdin(pristine, command, tmp_path, monkeypatch):
    prompt = "Grüße an die Welt: 🙂\nOnce"
    (tmp_path / "prompt").write_text(prompt, encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(prompt.encode())))
    outs = [
        command(*generated(pristine(), *source))[:2]
        for source in (
            ("--prompt", prompt),
            ("--prompt-file", tmp_path / "prompt"),
            ("--prompt", "-"),
        )
    ]
    assert outs[0] == outs[1] == outs[2]
    assert outs[0][0] == 0
    assert outs[0][1].startswith(prompt)


def test_json_holds_the_answer_and_its_figures(pristine, command):
    code, out, err = command(
        *generated(pristine(), "--prompt", PROMPT, "--draft-tokens", 2, "--json")
    )
    answer = json.loads(out)
    assert (code, err) == (0, "")
    assert answer.keys() == FIGURES
    assert answer["prompt"] == PROMPT
    assert len(answer["ids"]) == answer["generated_tokens"] == 12
    assert len(answer["drafted_tokens"]) == len(answer["accepted_tokens"]) == 2
    assert answer["forwards"] == 12 - sum(answer["accepted_tokens"])
    assert answer["forwards_saved"] == sum(answer["accepted_tokens"])
    assert answer["mean_accepted_length"] >= 1
    assert answer["drafting_seconds"] > 0 < answer["verifying_seconds"]
    plain = command(*generated(pristine(), "--prompt", PROMPT))[1]
    assert plain == PROMPT + answer["text"] + "\n"


@pytest.mark.parametrize("draft_tokens", [3, "auto"])
def test_what_drafts_gained_is_told_position_by_position(pristine, command, draft_tokens):
    shown = generated(pristine(), "--prompt", PROMPT)
    _, text, without = command(*shown)
    code, out, err = command(*shown, "--draft-tokens", draft_tokens)
    assert (code, out) == (0, text)
    assert "accepted by position" not in without
    shares = re.search(r"accepted by position: (.*)", err)[1].split(", ")
    assert all(re.fullmatch(r"\d+ of \d+ \(\d+ %\)", share) for share in shares)
    assert len(shares) == 3 if draft_tokens == 3 else len(shares) >= 2
    assert re.search(r"\d\.\d\d tokens a round; \d+ forwards instead of 12\n", err)
    assert re.search(r"\d\.\d\d s in drafting, \d\.\d\d s in verifying", err)


def test_a_seed_makes_draws_repeatable(pristine, command):
    drawn = [
        json.loads(
            command(
                *generated(pristine(), "--prompt", PROMPT, "--json", "--temp", 1.5, "--seed", seed),
                *("--top-k", 50, "--top-p", 0.95, "--min-p", 0.01),
            )[1]
        )["ids"]
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def begun_with(path, token):
    """The text that follows this token alone, by the library."""
    tokenizer, model = load_tokenizer(path), load_model(path, progress=False)
    ids = list(generate(model, [token], 12, stop_ids=tokenizer.stop_ids))
    return tokenizer.decode([token, *ids]), ids


@pytest.mark.parametrize("adds", [True, False])
def test_an_empty_prompt_begins_with_the_bos(tiny, command, adds):
    path = tiny()
    (path / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": adds}))
    code, out, err = command(*generated(path, "--prompt", ""))
    text, ids = begun_with(path, 1)
    assert (code, out) == (0, text + "\n")
    assert ("note: the text begins with a BOS token, which this tokenizer" in err) == (not adds)
    answer = json.loads(command(*generated(path, "--prompt", "", "--json"))[1])
    assert (answer["prompt"], answer["text"], answer["ids"]) == ("", text, ids)
    assert answer["prompt_tokens"] == 1


def test_the_bos_is_not_printed_even_where_decoding_spells_it(tiny, command):
    path = tiny()
    (path / "tokenizer.model").unlink()
    words = {f"w{i}": i for i in range(319)}
    library = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    library.add_tokens([tokenizers.AddedToken("<s>", special=False)])
    library.save(str(path / "tokenizer.json"))
    (path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>"}))
    text, ids = begun_with(path, 319)
    assert text.startswith("<s> w")
    assert 319 not in ids
    code, out, _ = command(*generated(path, "--prompt", ""))
    assert (code, out) == (0, text.removeprefix("<s>") + "\n")


def test_an_empty_prompt_without_a_bos_is_one_line(tiny, command):
    path, model = tiny(), io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SAMPLE_TEXT.split("\n")),
        model_writer=model,
        vocab_size=300,
        model_type="bpe",
        byte_fallback=True,
        bos_id=-1,
        minloglevel=2,
    )
    (path / "tokenizer.model").write_bytes(model.getvalue())
    said = refused(command(*generated(path, "--prompt", "", "--json")))
    assert f"{path}: the prompt has no token, and the tokenizer no BOS token" in said
    assert command(*prompt(path))[0] == 0


def test_no_new_tokens_is_the_prompt_alone(pristine, command):
    code, out, _ = command(*generated(pristine(), "--prompt", PROMPT, "--max-tokens", 0))
    assert (code, out) == (0, PROMPT + "\n")


WRONG_SETTINGS = [
    (("--temperature", "-1"), "temperature"),
    (("--temperature", "nan"), "temperature"),
    (("--temperature", "inf"), "temperature"),
    (("--top-p", "0"), "top_p"),
    (("--top-p", "2.0"), "top_p"),
    (("--top-p", "nan"), "top_p"),
    (("--top-k", "0"), "top_k"),
    (("--min-p", "-0.1"), "min_p"),
    (("--min-p", "1.5"), "min_p"),
    (("--max-new-tokens", "-1"), "max_new_tokens"),
    (("--max-new-tokens", "250"), "256 positions"),
    (("--max-new-tokens", "9" * 30), "256 positions"),
    (("--draft-tokens", "-1"), "draft_tokens"),
    (("--draft-tokens", "few"), "--draft-tokens"),
    (("--device", "toaster"), "--device toaster: not available; available: cpu"),
    (("--device", "meta"), "--device meta: not available"),
    (("--device", ""), "--device"),
    (("--temperature", "1", "--seed", "9" * 30), ""),
]
NAMES = [" ".join(setting)[:40] for setting, _ in WRONG_SETTINGS]


@pytest.mark.parametrize(("setting", "said"), WRONG_SETTINGS, ids=NAMES)
def test_a_wrong_setting_is_one_line(pristine, command, setting, said):
    assert said in refused(command(*generated(pristine(), "--json", "--prompt", PROMPT, *setting)))


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("conjure",),
        ("generate",),
        ("generate", "--prompt", "a", "--prompt-file", "b"),
        ("generate", "--prompt", "a", "--unknown"),
        ("generate", "--prompt", "a", "--temperature", "warm"),
        ("generate", "--prompt", "a", "--dtype", "int3"),
        ("make-tiny", "gpt2", "somewhere"),
        ("describe",),
    ],
)
def test_a_wrong_command_is_one_line_that_points_to_the_help(command, arguments):
    assert "--help)" in refused(command(*arguments))


@pytest.mark.parametrize("subject", ["", *COMMANDS])
def test_help_is_an_answer(command, subject):
    code, out, err = command(*subject.split(), "--help")
    assert (code, err) == (0, "")
    assert out.startswith("usage: python -m tools")


def list_arguments(name):
    """(argument of a command, what its help shows of it, in one line), in the order of the help."""
    (commands,) = make_parser()._subparsers._group_actions
    parser = commands.choices[name]
    shown = re.findall(r"^  (?! )(.+(?:\n   .+)*)", parser.format_help(), flags=re.MULTILINE)
    arguments = sorted(parser._actions, key=lambda argument: bool(argument.option_strings))
    return [(argument, " ".join(shown.pop(0).split())) for argument in arguments]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_explains_every_option_and_shows_each_default_once(name, monkeypatch):
    monkeypatch.setenv("COLUMNS", "500")
    for argument, shown in list_arguments(name):
        label = (argument.option_strings or [argument.metavar or argument.dest])[0]
        assert shown.startswith(label) or argument.choices
        assert argument.help, label
        assert " ".join(argument.help.split()) in shown
        defaults = re.findall(r"\(default: (.+?)\)", shown)
        assert shown.count("default") == len(defaults), label
        match argument.default:
            case None | False | "==SUPPRESS==":
                assert len(defaults) <= 1, label  # in words
                assert not {"None", "False", "==SUPPRESS=="} & set(defaults), label
            case list(values):
                assert defaults == [" ".join(map(str, values))]
            case value:
                assert defaults == [str(value)], label


def prompt(path, *more):
    return generated(path, "--prompt", PROMPT, *more)


def test_what_is_wrong_with_a_checkpoint_is_one_line(tiny, command, tmp_path):
    assert "nowhere: no such" in refused(command(*prompt(tmp_path / "nowhere")))
    assert "nowhere: no such" in refused(command("describe", tmp_path / "nowhere"))
    path = tiny()
    shards_of(path)[0].write_bytes(b"garbage")
    assert shards_of(path)[0].name in refused(command(*prompt(path)))
    assert shards_of(path)[0].name in refused(command("describe", path))
    (path / "config.json").write_text("garbage\nof\nlines")
    assert "config.json: not JSON" in refused(command("describe", path))
    assert "config.json: not JSON" in refused(command(*prompt(path)))


def test_a_checkpoint_without_tokenizer_is_one_line(tiny, command):
    path = tiny()
    (path / "tokenizer.model").unlink()
    assert "no tokenizer.json, tokenizer.model or tiktoken.model" in refused(command(*prompt(path)))


def test_a_tokenizer_of_another_model_is_one_line(tiny, command):
    path = tiny()
    (path / "tokenizer.model").write_bytes(train_vocabulary(SAMPLE_TEXT, 330))
    said = refused(command(*prompt(path)))
    assert "the tokenizer has 330 ids and the model 320: they do not belong together" in said


def test_a_vocabulary_padded_beyond_the_tokenizer_generates(tiny, command):
    path = tiny()
    tensors = tensors_of(path)
    favoured = {"lm_head.weight": 50.0, "model.layers.3.shared_head.head.weight": 50.0}
    for name, scale in favoured.items():
        padding = tensors[name][:64].flip(0) * scale
        tensors[name] = torch.cat([tensors[name], padding])
    for name in ("model.embed_tokens.weight", "model.layers.3.embed_tokens.weight"):
        tensors[name] = torch.cat([tensors[name], tensors[name][:64]])
    write_tensors(path, tensors)
    edit_json(path / "config.json", vocab_size=384)
    code, out, _ = command(*prompt(path, "--json"))
    answer = json.loads(out)
    assert code == 0
    assert max(answer["ids"]) >= 320


def test_a_prompt_that_cannot_be_read_is_one_line(pristine, command, tmp_path, monkeypatch):
    (tmp_path / "latin").write_bytes("Grüße".encode("latin-1"))
    said = refused(command(*generated(pristine(), "--prompt-file", tmp_path / "latin")))
    assert ": not UTF-8 text" in said
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff")))
    assert "stdin: not UTF-8 text" in refused(command(*generated(pristine(), "--prompt", "-")))
    said = refused(command(*generated(pristine(), "--prompt-file", tmp_path / "absent")))
    assert "absent: No such file" in said
    assert "Is a directory" in refused(command(*generated(pristine(), "--prompt-file", tmp_path)))
    said = refused(command(*generated(pristine(), "--prompt", "a\udcff")))
    assert "half a surrogate pair" in said


def test_a_prompt_longer_than_the_model_is_one_line(pristine, command):
    said = refused(command(*generated(pristine(), "--json", "--prompt", "x" * 400)))
    assert "exceed the model's 256 positions" in said


def test_drafts_without_mtp_modules_are_one_line(pristine, command):
    said = refused(command(*prompt(pristine("kimi_k2"), "--draft-tokens", 1, "--json")))
    assert "draft_tokens needs MTP modules" in said


def test_warnings_are_notes_on_stderr(tiny, command):
    path = tiny()
    tensors = tensors_of(path)
    kept = {name: t for name, t in tensors.items() if not name.startswith("model.layers.3.")}
    write_tensors(path, kept)
    code, out, err = command(*prompt(path, "--draft-tokens", 1, "--json"))
    note, error, end = err.split("\n")
    assert note.startswith("note: the config announces 1 MTP module(s)")
    assert error.startswith("error: draft_tokens needs MTP modules")
    assert (code, out, end) == (2, "", "")


class Interrupted:
    statistics = None

    def __iter__(self):
        yield from [10, 11]
        raise KeyboardInterrupt


def test_an_interruption_keeps_the_text_and_exits_with_130(pristine, command, monkeypatch):
    monkeypatch.setattr(tools.generate, "generate", lambda *args, **options: Interrupted())
    code, out, err = command(*prompt(pristine()))
    tokenizer = load_tokenizer(pristine())
    assert code == 130
    assert out == tokenizer.decode([*tokenizer.encode(PROMPT), 10, 11]) + "\n"
    assert err == "interrupted\n"


def test_ctrl_c_ends_a_real_run_quietly(tiny, tmp_path):
    path = tiny()
    os.mkfifo(tmp_path / "prompt")  # nobody writes: the run waits until it is interrupted
    arguments = ("generate", "--model", path, "--prompt-file", tmp_path / "prompt")
    heeding = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    with in_a_process(*arguments, **heeding) as run:
        writer = os.open(tmp_path / "prompt", os.O_WRONLY)
        run.send_signal(signal.SIGINT)
        out, err = run.communicate(timeout=60)
        os.close(writer)
    assert (run.returncode, out, err) == (130, b"", b"interrupted\n")


@pytest.mark.parametrize("what", ["describe", "describe at length", "generate"])
def test_a_reader_that_leaves_early_is_no_error(pristine, what):
    path = pristine()
    at_length = ["--tensors"] * what.endswith("at length")
    arguments = prompt(path) if what == "generate" else ("describe", path, *at_length)
    with in_a_process(*arguments) as run:
        run.stdout.close()
        err = run.stderr.read()
    assert run.wait() == 0
    assert b"Traceback" not in err
    assert b"BrokenPipe" not in err


def test_a_real_run_without_a_terminal_is_plain_text(pristine):
    with in_a_process(*prompt(pristine(), "--json")) as run:
        out, err = run.communicate(timeout=120)
    assert (run.returncode, err) == (0, b"")
    assert json.loads(out).keys() == FIGURES


TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}[{{ message.role }}] {{ message.content }}"
    "{{ eos_token }}{% endfor %}[assistant]"
)


@pytest.fixture
def talkative(tiny):
    """A tiny model with a chat template."""
    path = tiny()
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return path


def turns(*contents, system=None):
    """A conversation: the user and the assistant take turns."""
    spoken = [
        {"role": ("user", "assistant")[i % 2], "content": content}
        for i, content in enumerate(contents)
    ]
    return [*([] if system is None else [{"role": "system", "content": system}]), *spoken]


def answer_to(path, messages, max_new_tokens=12):
    """What the model answers, by the library."""
    tokenizer, model = load_tokenizer(path), load_model(path, progress=False)
    prompt_ids = tokenizer.chat(messages)
    ids = list(generate(model, prompt_ids, max_new_tokens, stop_ids=tokenizer.stop_ids))
    return tools.generate.text_of(tokenizer, prompt_ids, ids)


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_generate_answers_in_a_chat_and_prints_the_answer_alone(talkative, command, system):
    told = [] if system is None else ["--system", system]
    arguments = generated(talkative, "--chat", "--prompt", PROMPT, *told)
    code, out, err = command(*arguments)
    answer = answer_to(talkative, turns(PROMPT, system=system))
    assert (code, out) == (0, answer + "\n")
    assert "parameters" in err
    in_json = json.loads(command(*arguments, "--json")[1])
    assert (in_json["prompt"], in_json["text"]) == (PROMPT, answer)
    assert answer != answer_to(talkative, turns(PROMPT, system="Be long."))


def test_a_chat_without_template_is_refused_before_weights_are_read(pristine, tiny, command):
    path = tiny()
    for file in shards_of(path):
        file.unlink()
    for arguments in (generated(path, "--chat", "--prompt", PROMPT), chatting(path)):
        said = refused(command(*arguments))
        assert f"{path}: no chat template" in said
        assert "choose a model with a chat template" in said
        assert "or continue a text with `generate`" in said
    assert "it needs --chat" in refused(command(*prompt(pristine(), "--system", "Be brief.")))


def test_a_chat_needs_a_model_by_name(command):
    assert "the following arguments are required: --model" in refused(command("chat"))
    for name in ("chat", "generate"):
        text = " ".join(command(name, "--help")[1].split())
        assert "a chat template, such as instruct models have" in text


def test_a_template_that_fails_is_one_line(talkative, command, monkeypatch):
    (talkative / "chat_template.jinja").write_text("\n{{ raise_exception('no\nway') }}")
    said = refused(command(*generated(talkative, "--chat", "--prompt", PROMPT)))
    assert "chat_template.jinja: line 2: no way" in said
    typed(monkeypatch, "hello\n")
    assert "line 2: no way" in refused(command(*chatting(talkative)))


def chatting(path, *more):
    return ("chat", "--model", path, "--max-new-tokens", "12", *more)


def typed(monkeypatch, text):
    raw = text if isinstance(text, bytes) else text.encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw)))


@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize("end", ["", "/exit\nnever said\n"])
def test_a_chat_remembers_what_was_said(talkative, command, monkeypatch, system, end):
    told = [] if system is None else ["--system", system]
    typed(monkeypatch, f"One apple?\n\n  Why? \n/reset\nA king!\n{end}")
    code, out, err = command(*chatting(talkative, *told))
    first = answer_to(talkative, turns("One apple?", system=system))
    second = answer_to(talkative, turns("One apple?", first, "Why?", system=system))
    third = answer_to(talkative, turns("A king!", system=system))
    assert (code, out, err) == (0, f"{first}\n{second}\n{third}\n", "")


def test_a_seed_makes_a_chat_repeatable(talkative, command, monkeypatch):
    outs = []
    for seed in (1, 1, 2):
        typed(monkeypatch, "One apple?\n")
        drawing = ("--temp", 1.5, "--seed", seed, "--top-k", 50, "--top-p", 0.95, "--min-p", 0.01)
        outs.append(command(*chatting(talkative, *drawing, "--draft-tokens", 1))[1])
    assert outs[0] == outs[1] != outs[2]


def test_a_conversation_that_does_not_fit_is_told_and_can_be_reset(talkative, command, monkeypatch):
    typed(monkeypatch, "x" * 300 + "\nOne apple?\n" + "y" * 220 + "\n/reset\nA king!\n")
    code, out, err = command(*chatting(talkative))
    first = answer_to(talkative, turns("One apple?"))
    third = answer_to(talkative, turns("A king!"))
    assert (code, out) == (0, f"{first}\n{third}\n")
    length = len(load_tokenizer(talkative).chat(turns("x" * 300)))
    told = [
        f"error: the conversation would be {tokens} tokens long and the model has 256 positions; "
        "/reset starts a new one"
        for tokens in (
            length,
            len(load_tokenizer(talkative).chat(turns("One apple?", first, "y" * 220))),
        )
    ]
    assert err.splitlines() == told


def test_an_answer_ends_where_the_positions_do(talkative, command, monkeypatch):
    line = "One apple?"
    left = 256 - len(load_tokenizer(talkative).chat(turns(line)))
    typed(monkeypatch, line)
    answer = answer_to(talkative, turns(line), left)
    assert command("chat", "--model", talkative) == (0, answer + "\n", "")
    assert left > 200


def test_a_stop_token_ends_an_answer(talkative, command, monkeypatch):
    whole = json.loads(command(*generated(talkative, "--chat", "--prompt", "Why?", "--json"))[1])
    stop = whole["ids"][5]
    (talkative / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, stop]}))
    answer = answer_to(talkative, turns("Why?"))
    assert whole["text"].startswith(answer)
    assert whole["text"] != answer
    assert command(*generated(talkative, "--chat", "--prompt", "Why?"))[1] == answer + "\n"
    typed(monkeypatch, "Why?")
    assert command(*chatting(talkative))[1] == answer + "\n"


def test_ctrl_c_stops_an_answer_and_keeps_its_part(talkative, command, monkeypatch):
    prompts = []

    def interrupted(model, prompt_ids, *rest, **options):
        prompts.append(prompt_ids)
        return Interrupted()

    monkeypatch.setattr(tools.chat, "generate", interrupted)
    typed(monkeypatch, "One apple?\nWhy?\n")
    code, out, err = command(*chatting(talkative))
    tokenizer = load_tokenizer(talkative)
    part = tools.generate.text_of(tokenizer, prompts[0], [10, 11])
    assert (code, out, err) == (0, f"{part}\n" * 2, "")
    assert part
    assert prompts == [
        tokenizer.chat(turns("One apple?")),
        tokenizer.chat(turns("One apple?", part, "Why?")),
    ]


def test_ctrl_c_at_the_prompt_ends_a_chat(talkative, command, monkeypatch):
    class Terminal(io.TextIOWrapper):
        def isatty(self):
            return True

    class Keys(io.BytesIO):
        def readline(self):
            line = super().readline()
            if not line:
                raise KeyboardInterrupt
            return line

    monkeypatch.setattr(sys, "stdin", Terminal(Keys(b"One apple?\n")))
    code, out, err = command(*chatting(talkative))
    assert (code, err) == (130, "> > interrupted\n")
    assert out == answer_to(talkative, turns("One apple?")) + "\n"


def test_a_line_that_is_no_text_is_told_and_passed_over(talkative, command, monkeypatch):
    typed(monkeypatch, b"\xff\nOne apple?\n")
    code, out, err = command(*chatting(talkative))
    assert (code, out) == (0, answer_to(talkative, turns("One apple?")) + "\n")
    assert err.startswith("error: this line is not UTF-8 text")


def test_a_wrong_setting_of_a_chat_is_one_line(talkative, command, monkeypatch):
    for setting, said in (
        (("--temperature", -1), "temperature"),
        (("--device", "toaster"), "device"),
    ):
        typed(monkeypatch, "One apple?\n")
        assert said in refused(command(*chatting(talkative, *setting)))


def test_a_real_chat_over_a_pipe(talkative):
    with in_a_process(*chatting(talkative), stdin=subprocess.PIPE) as run:
        out, err = run.communicate(b"One apple?\n/exit\n", timeout=120)
    assert (run.returncode, err) == (0, b"")
    assert out.decode() == answer_to(talkative, turns("One apple?")) + "\n"


def files_of(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.mark.parametrize("family", ["deepseek_v2", "deepseek_v3", "gpt_oss", "kimi_k2", "kimi_k25"])
def test_make_tiny_writes_the_same_bytes_for_the_same_seed(command, tmp_path, family):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        code, out, err = command("make-tiny", family, tmp_path / name, "--seed", seed)
        assert (code, out, err) == (0, f"{tmp_path / name}\n", "")
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    assert tensors_of(tmp_path / "a").keys() == tensors_of(tmp_path / "c").keys()
    for name, tensor in tensors_of(tmp_path / "a").items():
        assert tensor.isfinite().all(), name
        assert not tensor.equal(tensors_of(tmp_path / "c")[name]), name
        assert tensor.std() > 0, name


def test_make_tiny_never_overwrites(command, tmp_path):
    (tmp_path / "note").write_text("precious")
    for path in (tmp_path, tmp_path / "note"):
        said = refused(command("make-tiny", "deepseek_v3", path))
        assert "exists already" in said
    assert files_of(tmp_path) == {"note": b"precious"}


def test_describe_counts_what_is_there(pristine, command):
    path = pristine()
    code, out, err = command("describe", path, "--json")
    facts = json.loads(out)
    model, tensors = load_model(path, progress=False), tensors_of(path)
    own = sum(parameter.numel() for parameter in model.parameters())
    mtp = sum(parameter.numel() for parameter in model.mtp.parameters())
    assert (code, err) == (0, "")
    assert facts["family"] == "deepseek_v3"
    assert facts["parameters"] == own - mtp
    assert facts["parameters of the MTP modules"] == mtp
    assert facts["of them used per token"] == own - mtp - 2 * (8 - 3) * 3 * 48 * 24
    assert facts["cache bytes per token (bfloat16)"] == 3 * (20 + 8) * 2
    assert facts["with plain multi-head attention"] == 3 * 4 * (12 + 8 + 16) * 2
    assert facts["stored tensors"] == len(tensors)
    assert facts["bytes on disk"] == sum(tensor.nbytes for tensor in tensors.values())
    assert facts["weights stored as"] == f"{len(tensors)} F32"
    assert "architectures" in facts["config keys not used"]
    assert "model_type" not in facts["config keys not used"]
    assert list(facts["layers"]) == ["layer 0", "layers 1 to 2", "mtp 3"]
    assert facts["tensors"].keys() == tensors.keys()
    assert facts["tensors"]["lm_head.weight"] == ["F32", 320, 48]
    text = command("describe", path)[1]
    assert f"{own - mtp:,}" in text
    assert "lm_head.weight" not in text
    assert "lm_head.weight" in command("describe", path, "--tensors")[1]


def test_describe_reads_headers_and_no_weights(pristine, command, tmp_path):
    path = shutil.copytree(pristine(), tmp_path / "copy")
    expected = command("describe", path, "--json", "--tensors")
    for file in shards_of(path):
        content = file.read_bytes()
        header = 8 + int.from_bytes(content[:8], "little")
        with file.open("r+b") as build_on_meta:  # the same length, with nothing in it
            build_on_meta.truncate(header)
            build_on_meta.truncate(len(content))
    assert command("describe", path, "--json", "--tensors") == expected
    assert expected[0] == 0


def test_describe_takes_a_config_alone(pristine, command):
    code, out, _ = command("describe", pristine("deepseek_v2") / "config.json", "--json")
    facts = json.loads(out)
    assert (code, facts["family"], facts["stored tensors"]) == (0, "deepseek_v2", 0)


def test_describe_of_garbage_is_one_line(command, tmp_path):
    (tmp_path / "x").write_bytes(os.urandom(1000) + b"\xff")
    assert "x: not UTF-8" in refused(command("describe", tmp_path / "x"))


def test_decoding_is_compiled_if_asked(pristine, monkeypatch, capsys):
    compiled = []
    monkeypatch.setattr("tools.generate.compile_decoding", compiled.append)
    command = ["generate", "--model", str(pristine()), "--prompt", "king", "--max-new-tokens", "2"]
    assert main(command) == 0
    assert compiled == []
    assert main([*command, "--compile", "--prefill-chunk", "1"]) == 0
    assert len(compiled) == 1
    capsys.readouterr()
    assert main([*command, "--prefill-chunk", "0"]) == 2
    assert "prefill_chunk = 0: must be a whole number >= 1" in capsys.readouterr().err
