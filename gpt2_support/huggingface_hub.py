"""GPT-2s of the Hugging Face hub (https://huggingface.co): their names, and fetching their files.

A repository is OWNER/NAME; a few old ones have no owner. After an @ stands a revision: a branch, a
tag or a commit, `main` by default. A file is at ENDPOINT/REPOSITORY/resolve/REVISION/FILE. The
answer names the commit, and all files are taken from that one. A large file is on another host, to
which the first one redirects, having said the file's size and SHA-256. HF_ENDPOINT of the
environment is another server of the same kind, HF_TOKEN the password for private models.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from gpt2_support.files import check_regular
from gpt2_support.formats import huggingface
from gpt2_support.formats.token_table import load_tokenizer
from gpt2_support.http import BadAnswer, Effort, RefusedRequest, RemoteFile, fetch, look, public
from gpt2_support.messages import info
from gpt2_support.params import Config, n_params
from gpt2_support.weights import SAVE_ADVICE

ENDPOINT = "https://huggingface.co"
PART = r"(?!.*\.\.)[a-zA-Z0-9_][a-zA-Z0-9._-]{,95}(?<![.-])"  # no path, no hidden file
NAME = re.compile(rf"((?:{PART}/)?{PART})(?:@({PART}))?")
WITHOUT_OWNER = ("distilgpt2", "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
NO_OWNERS = ("models", "datasets", "spaces")  # the hub has pages of these names
CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
TOKENIZERS = (("vocab.json", "merges.txt"), ("tokenizer.json",))
MAX_BYTES = {  # GPT-2's own have 1, 1, 0.5 and 1.4 MB; a vocabulary may be five times as large
    **{CONFIG: 200_000, INDEX: 1_000_000},
    **{"vocab.json": 10_000_000, "merges.txt": 10_000_000, "tokenizer.json": 30_000_000},
}

ANY_SIZE = 10**18


def is_repository(name: str) -> bool:
    """Return whether this can be the name of a model of the hub."""
    match = NAME.fullmatch(name)
    if not match:
        return False
    owner, _, rest = match[1].rpartition("/")
    return owner not in NO_OWNERS if owner else rest in WITHOUT_OWNER


def endpoint() -> str:
    """Return the address of the hub, or of its mirror that HF_ENDPOINT names."""
    return (os.environ.get("HF_ENDPOINT") or ENDPOINT).rstrip("/")


def read_token() -> str | None:
    """Return the token in HF_TOKEN, or None; raise ValueError if it cannot be one."""
    token = os.environ.get("HF_TOKEN", "").strip()
    if not re.fullmatch("[!-~]*", token):
        raise ValueError("HF_TOKEN: has a space or another character that no token has")
    return token or None


class Repository:
    """A model of the hub at one commit, whose files go to a folder."""

    def __init__(self, name: str, effort: Effort) -> None:
        match = NAME.fullmatch(name)
        if not match:
            raise ValueError(f"{name!r} is not the name of a model: expected owner/name[@revision]")
        self.name, self.revision = match[1], match[2] or "main"
        self.page, self.token, self.effort = f"{endpoint()}/{self.name}", read_token(), effort
        commit = self.look(CONFIG, MAX_BYTES[CONFIG]).commit or ""
        self.effort = effort._replace(has_answered=True)
        self.commit = commit if re.fullmatch("[0-9a-f]{40}", commit) else None
        self.revision = self.commit or self.revision

    def url(self, file_name: str) -> str:
        """Return the address of a file."""
        return f"{self.page}/resolve/{self.revision}/{file_name}"

    def look(self, file_name: str, max_bytes: int) -> RemoteFile:
        """Return what the hub says about a file; raise RefusedRequest that says what to do."""
        try:
            return look(self.url(file_name), max_bytes, self.token, self.effort)
        except RefusedRequest as error:
            message = self.explain(error, file_name)
            raise RefusedRequest(message, error.status, error.code) from None

    def find(self, file_name: str, max_bytes: int) -> RemoteFile | None:
        """Return what the hub says about a file, None if there is no such file."""
        try:
            return self.look(file_name, max_bytes)
        except RefusedRequest as error:
            if error.status != 404:
                raise
            return None

    def fetch(self, file_name: str, folder: Path, max_bytes: int) -> Path:
        """Download a file unless it is there, and return its path."""
        path = folder / file_name
        if path.exists():
            check_regular(path)
        else:
            fetch(self.url(file_name), path, max_bytes, None, self.token, self.effort)
        return path

    def explain(self, error: RefusedRequest, file_name: str) -> str:
        """Return what a refusal means, and what to do about it."""
        page, name = public(self.page), self.name
        tell = "HF_TOKEN may not read it" if self.token else "put a token that may into HF_TOKEN"
        if error.code == "RevisionNotFound":
            return f"{name}: no revision {self.revision} at {page}"
        if error.code == "EntryNotFound":
            return f"{name}: no {file_name} at {page}: not a model that transformers loads"
        if error.status == 403 or error.code == "GatedRepo":
            return f"{name}: a gated or private model: accept its terms at {page}, and {tell}"
        if error.status == 401:
            return f"{name}: no such model at {page}, or a private or gated one: {tell}"
        status = f"HTTP status {error.status}"
        return f"{name}: no such model at {page}, or no {file_name} ({status}): check its name"


def fetch_model(
    name: str, work: Path, target: Path, effort: Effort, only_tokenizer: bool = False
) -> Path:
    """Download a GPT-2 of the hub to a folder in `work`, and return that one, to be converted.

    Says what is downloaded, how large it is, and where to (`target`). `only_tokenizer` leaves out
    the weights. Raises ValueError if it is not a GPT-2 that we read, RefusedRequest if the hub has
    no such model or does not give it, and what `fetch` raises. A download that was interrupted goes
    on if the model is still the same.
    """
    repository = Repository(name, effort)
    folder = work / repository.revision
    folder.mkdir(exist_ok=True)
    if not repository.commit:  # what is there may be of another one
        for path in folder.iterdir():
            if not path.name.endswith((".part", ".part.json")):
                path.unlink()
    try:
        config = fetch_small_files(repository, folder)
        if only_tokenizer:
            return folder
        sizes = find_weights(repository, folder, config)
    except (ValueError, RefusedRequest):
        names = [path.name.removesuffix(".part") for path in folder.iterdir()]
        if not any(name.endswith(".safetensors") for name in names):  # nothing large
            shutil.rmtree(folder)
        raise
    size = sum(size or 0 for size in sizes.values())
    info(f"{name}: downloading {size / 1e6:,.1f} MB from {public(repository.page)} to {target}")
    for file_name in sizes:
        repository.fetch(file_name, folder, max_bytes(config))
    return folder


def fetch_small_files(repository: Repository, folder: Path) -> Config:
    """Download and check the config and the tokenizer, which not every model has."""
    path = repository.fetch(CONFIG, folder, MAX_BYTES[CONFIG])
    try:
        config = huggingface.read_config(path)
        for names in TOKENIZERS:
            if all(repository.find(file_name, MAX_BYTES[file_name]) for file_name in names):
                for file_name in names:
                    repository.fetch(file_name, folder, MAX_BYTES[file_name])
                load_tokenizer(folder)
                break
    except BadAnswer:
        raise
    except ValueError as error:
        problem = str(error).replace(f"{folder}{os.sep}", "")
        raise ValueError(f"{repository.name}: not a GPT-2 that can run here: {problem}") from None
    return config


def find_weights(repository: Repository, folder: Path, config: Config) -> dict[str, int | None]:
    """Return {name: size} of the safetensors files of a model."""
    remote = repository.find(WEIGHTS, max_bytes(config))
    if remote:
        return {WEIGHTS: remote.size}
    if repository.find(INDEX, MAX_BYTES[INDEX]):
        names = huggingface.read_index(repository.fetch(INDEX, folder, MAX_BYTES[INDEX]))
        return {name: repository.look(name, max_bytes(config)).size for name in names}
    name, page = repository.name, public(repository.page)
    if repository.find("pytorch_model.bin", ANY_SIZE):
        raise ValueError(f"{name}: only pytorch_model.bin at {page}: {SAVE_ADVICE}")
    raise ValueError(f"{name}: no {WEIGHTS} at {page}")


def max_bytes(config: Config) -> int:
    """Return the most that a safetensors file of a GPT-2 takes: in float32, with all its extras.

    The extras are the masks of attention, an output head that repeats wte, and the header.
    """
    masks = config.n_layer * (config.n_ctx**2 + 1)
    return 4 * (n_params(config) + masks + config.n_vocab * config.n_embd) + 1_000_000
