"""The registry of published weights, their hashes, and how they are fetched: pytest tests/test_assets.py"""

import hashlib
import http.server
import json
import os
import re
import shutil
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import commands
import pytest

from diffrep import assets
from diffrep.assets import ASSETS, Asset, check_or_record, expected_path, find, local, recorded_hash, state
from diffrep.data import fetch as fetching
from diffrep.data.fetch import fetch, listing
from diffrep.errors import RunError, UserError

CONTENT = bytes(range(256)) * 4000  # 1,024,000 bytes
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder to work in, and no other place to look."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.delenv("DIFFREP_DATA", raising=False)
    monkeypatch.setattr(fetching, "PAUSE", 0.0)
    return folder


# The registry


KEYS = [
    "ddpm-cifar10-32",
    "ddpm-ema-celebahq-256",
    "adm-64",
    "adm-128",
    "adm-256",
    "adm-256-uncond",
    "adm-512",
    "adm-lsun-bedroom",
    "adm-lsun-cat",
    "adm-lsun-horse",
    "adm-lsun-horse-nodropout",
    "dit-xl-2-256",
    "dit-xl-2-512",
    "sd-vae-mse",
    "sd-vae-ema",
    "mage-tokenizer",
    "mage-vitb-1600",
    "mage-vitl-1600",
    "addp-vit-base-16",
    "addp-vit-large-16",
    "fastdfkd",
    "torchvision-resnet18",
    "torchvision-resnet34",
    "torchvision-resnet50",
    "torchvision-shufflenetv2",
]


def test_every_published_file_of_the_roads_is_known_once():
    found = [find(key) for key in KEYS]
    assert None not in found and len({a.key for a in found}) == len(ASSETS) == len(KEYS)
    places = [a.name for a in ASSETS.values()]
    assert len(set(places)) == len(places)
    for asset in ASSETS.values():
        assert asset.licence and asset.purpose
        assert (asset.source == "http") == asset.location.startswith("https://")
        assert asset.source != "http" or asset.location.endswith(f"/{asset.file}")
        assert asset.source != "hub" or re.fullmatch(r"[\w.-]+/[\w.-]+", asset.location)
        assert asset.source != "browser" or asset.page.startswith("https://")


@pytest.mark.parametrize(
    ("reference", "key"),
    [
        ("64x64_diffusion.pt", "adm-64"),
        ("somewhere/256x256_diffusion_uncond.pt", "adm-256-uncond"),
        ("DiT-XL-2-512x512.pt", "dit-xl-2-512"),
        ("google/ddpm-cifar10-32", "ddpm-cifar10-32"),
        ("vqgan_jax_strongaug", "vqgan_jax_strongaug"),
        ("mage-tokenizer", "vqgan_jax_strongaug"),
        ("addp-vit-base-16.pth", "addp-vit-base-16"),
    ],
)
def test_a_key_a_location_and_a_file_name_find_it(reference, key):
    assert find(reference).key == key


@pytest.mark.parametrize("reference", ["", "adm", "runs/ddpm-cifar10-32", "diffusion.pt", "weights/adm-64"])
def test_what_is_no_published_file_is_not_found(reference):
    assert find(reference) is None


def test_what_its_authors_keep_for_non_commercial_use():
    assert {a.key for a in ASSETS.values() if a.non_commercial} == {
        "dit-xl-2-256", "dit-xl-2-512", "addp-vit-base-16", "addp-vit-large-16",
    }  # fmt: skip


def test_only_what_is_on_the_hub_is_called_by_a_hub_id():
    assert assets.looks_like_hub_id("nobody/anything") and assets.looks_like_hub_id("ddpm-cifar10-32")
    assert not assets.looks_like_hub_id("adm-64") and not assets.looks_like_hub_id("mage-vitb-1600")


def test_torchvisions_names_and_sizes_are_its_own():
    """Against the installed torchvision: address, parameters, and the hash that a name ends with."""
    from diffrep import _torchvision_compat

    _torchvision_compat.install()
    from torchvision import models

    names = {
        "resnet18": "resnet18",
        "resnet34": "resnet34",
        "resnet50": "resnet50",
        "shufflenetv2": "shufflenet_v2_x1_0",
    }
    for name, theirs in names.items():
        weights, asset = models.get_model_weights(theirs).IMAGENET1K_V1, ASSETS[f"torchvision-{name}"]
        assert (asset.location, asset.parameters) == (weights.url, weights.meta["num_params"])
        assert asset.file == f"{Path(weights.url).stem.partition('-')[0]}-{asset.sha256}.pth"


# Where they belong


def test_here_comes_before_the_data_folder_which_is_where_new_files_go(here, tmp_path, monkeypatch):
    asset, root = ASSETS["adm-64"], tmp_path / "root"
    assert expected_path(asset) == Path("weights/64x64_diffusion.pt") and local(asset) is None
    monkeypatch.setenv("DIFFREP_DATA", str(root))
    assert expected_path(asset) == root / "weights/64x64_diffusion.pt"
    put(root / "weights/64x64_diffusion.pt")
    assert local(asset) == root / "weights/64x64_diffusion.pt"
    put(here / "weights/64x64_diffusion.pt")
    assert local(asset) == expected_path(asset) == Path("weights/64x64_diffusion.pt")


def put(path, content=b"x"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def sized(path, size):
    with open(put(path), "wb") as file:
        file.truncate(size)


def test_the_state_of_a_file_is_told_by_its_size_and_its_part(here):
    base, adm = ASSETS["addp-vit-base-16"], ASSETS["adm-64"]
    assert state(base) == state(adm) == "not here"
    sized(here / "weights/addp-vit-base-16.pth", 1_392_226_651)
    put(here / "weights/64x64_diffusion.pt.part")
    assert state(base) == state(adm) == "incomplete" and local(base) is None
    sized(here / "weights/addp-vit-base-16.pth", 1_392_500_000)
    assert state(base) == "here"
    put(here / "weights/64x64_diffusion.pt", b"")
    assert state(adm) == "incomplete"


def test_the_state_of_a_folder_is_told_by_what_it_holds(here):
    ddpm, teachers = ASSETS["ddpm-cifar10-32"], ASSETS["fastdfkd"]
    put(here / "weights/ddpm-cifar10-32/unet/config.json")
    assert state(ddpm) == "incomplete"
    put(here / "weights/ddpm-cifar10-32/unet/diffusion_pytorch_model.safetensors")
    assert state(ddpm) == "here" and local(ddpm) == Path("weights/ddpm-cifar10-32")
    for name in teachers.holds:
        assert state(teachers) != "here"
        put(here / "weights/fastdfkd" / name)
    assert state(teachers) == "here"


def test_a_converted_folder_stands_for_its_file(here):
    """What ``diffrep convert`` makes of a released file has the key as its name."""
    put(here / "weights/addp-vit-base-16/addp/config.json")
    put(here / "weights/addp-vit-base-16/addp/weights.safetensors")
    assert local(ASSETS["addp-vit-base-16"]) == Path("weights/addp-vit-base-16")


# Hashes


@pytest.fixture
def readings(monkeypatch):
    """Every file that was read for its hash."""
    seen, real = [], assets.sha256_of
    monkeypatch.setattr(assets, "sha256_of", lambda file: seen.append(file.name) or real(file))
    return seen


def test_an_unknown_hash_is_recorded_once_and_the_file_read_once(here, readings):
    file = put(here / "a.pt", CONTENT)
    assert recorded_hash(file) is None
    assert check_or_record(file) == "hash recorded" and recorded_hash(file) == SHA256
    assert check_or_record(file) == "hash as recorded" and readings == ["a.pt"]
    os.utime(file, ns=(1, 1))  # copied again: read again, and the record follows
    assert check_or_record(file) == "hash as recorded" and check_or_record(file) == "hash as recorded"
    assert readings == ["a.pt", "a.pt"]


@pytest.mark.parametrize("content", [CONTENT[:-1], CONTENT[:-1] + b"x", b""])
def test_a_file_that_changed_is_refused(here, content):
    file = put(here / "a.pt", CONTENT)
    check_or_record(file)
    file.write_bytes(content)
    os.utime(file, ns=(1, 1))
    with pytest.raises(UserError, match=r"a\.pt has changed since its first use .*delete a\.pt\.sha256\.json") as told:
        check_or_record(file)
    assert "\n" not in str(told.value) and recorded_hash(file) == SHA256
    (here / "a.pt.sha256.json").unlink()
    assert check_or_record(file) == "hash recorded"


def test_a_published_hash_is_held_against(here, readings):
    asset = Asset("a", "https://nowhere/a.pt", "none", "a.pt", sha256=SHA256[:8])
    file = put(here / "a.pt", CONTENT)
    assert check_or_record(file, asset) == check_or_record(file, asset) == "hash as published" and len(readings) == 1
    other = put(here / "other" / "a.pt", CONTENT[1:])
    with pytest.raises(UserError, match=r"is not the published file: SHA-256 [0-9a-f]{12}\.\.\., not " + SHA256[:8]):
        check_or_record(other, asset)
    assert recorded_hash(other) is None


def test_each_file_of_a_folder_has_its_own_record(here):
    put(here / "net/config.json", b"{}")
    unet, vae = put(here / "net/unet/model.safetensors", b"1"), put(here / "net/vae/model.bin", b"2")
    assert check_or_record(here / "net") == "hash recorded"
    assert recorded_hash(unet) and recorded_hash(vae) and recorded_hash(here / "net/config.json") is None
    vae.write_bytes(b"3")
    os.utime(vae, ns=(1, 1))
    with pytest.raises(UserError, match=r"vae/model\.bin has changed"):
        check_or_record(here / "net")


def test_where_nothing_can_be_written_the_hash_stays_unknown(here, monkeypatch, readings):
    file = put(here / "a.pt", CONTENT)
    (here / "a.pt.sha256.json").mkdir()  # in the way of the record
    assert check_or_record(file).startswith("hash unknown")
    shutil.rmtree(here / "a.pt.sha256.json")
    readings.clear()
    monkeypatch.setattr(os, "access", lambda *_: False)  # whoever runs tests as root may write everywhere
    assert check_or_record(file).startswith("hash unknown") and readings == [] and len(list(here.iterdir())) == 1


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"sha256": 3}'])
def test_a_damaged_record_is_named(here, text):
    file = put(here / "a.pt", CONTENT)
    (here / "a.pt.sha256.json").write_text(text)
    with pytest.raises(UserError, match=r"a\.pt\.sha256\.json is (not readable JSON|no record of a hash)"):
        check_or_record(file)


# Fetching


class Server(http.server.ThreadingHTTPServer):
    """One file at one address; what it does wrong is set by the test."""

    daemon_threads = True
    content, tag = CONTENT, '"one"'
    knows_ranges, says_length, kind, status = True, True, "application/octet-stream", 200
    stops_after: list = []  # bytes that each of the next answers sends before it ends
    shift = 0  # how far from the place asked for an answer begins

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked, self.hold, self.stops_after = [], threading.Event(), []

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/net.pt"


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        server, wanted = self.server, self.headers.get("Range")
        server.asked.append(wanted)
        start = int(wanted[6:-1]) if wanted and server.knows_ranges else 0
        if self.headers.get("If-Range", server.tag) != server.tag:
            start = 0
        if start and start >= len(server.content):
            return self.send_error(416)
        if server.status != 200:
            return self.send_error(server.status)
        self.send_response(206 if start else 200)
        body = server.content[start + server.shift if start else 0 :]
        if start:
            begin = start + server.shift
            self.send_header("Content-Range", f"bytes {begin}-{len(server.content) - 1}/{len(server.content)}")
        if server.says_length:
            self.send_header("Content-Length", str(len(body)))
        if server.tag:
            self.send_header("ETag", server.tag)
        self.send_header("Content-Type", server.kind)
        self.end_headers()
        limit = server.stops_after.pop(0) if server.stops_after else None
        self.wfile.write(body[:limit])
        if limit == -1:  # as much as that and then nothing, until the test says so
            server.hold.wait(60)


@pytest.fixture
def server(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    served = Server()
    threading.Thread(target=served.serve_forever, args=(0.02,), daemon=True).start()
    yield served
    served.hold.set()
    served.shutdown()
    served.server_close()


@pytest.fixture
def net(server, monkeypatch):
    """A published file that this machine serves."""
    asset = Asset("net", server.url, "a licence", "net.pt", "tests")
    monkeypatch.setitem(ASSETS, "net", asset)
    return asset


def change(monkeypatch, asset, **fields):
    monkeypatch.setitem(ASSETS, asset.key, replace(asset, **fields))


def names(folder):
    return sorted(file.name for file in Path(folder).iterdir())


def test_a_file_is_fetched_whole_and_its_hash_recorded(here, net, server):
    said = []
    found = fetch("net", say=said.append)
    assert found == {
        "key": "net", "path": "weights/net.pt", "licence": "a licence", "fetched": True, "hash": "hash recorded",
    }  # fmt: skip
    assert (here / "weights/net.pt").read_bytes() == CONTENT and said == ["net: licence: a licence"]
    assert names("weights") == ["net.pt", "net.pt.sha256.json"] and state(net) == "here"
    again = fetch("net.pt")
    assert not again["fetched"] and again["hash"] == "hash as recorded" and len(server.asked) == 1


def test_another_folder_may_be_named(here, net):
    assert fetch("net", to="elsewhere/deep")["path"] == "elsewhere/deep/net.pt"
    assert (here / "elsewhere/deep/net.pt").read_bytes() == CONTENT and not (here / "weights").exists()


def test_a_broken_connection_goes_on_where_it_stopped(here, net, server):
    server.stops_after = [300_000, 200_000]
    fetch("net")
    assert server.asked == [None, "bytes=300000-", "bytes=500000-"]
    assert (here / "weights/net.pt").read_bytes() == CONTENT and names("weights") == ["net.pt", "net.pt.sha256.json"]


def test_a_server_without_ranges_sends_all_of_it_again(here, net, server):
    server.knows_ranges, server.stops_after = False, [300_000]
    fetch("net")
    assert server.asked == [None, "bytes=300000-"] and (here / "weights/net.pt").read_bytes() == CONTENT


def test_a_server_that_does_not_say_how_long_it_is(here, net, server):
    server.says_length, server.tag = False, ""
    fetch("net")
    assert (here / "weights/net.pt").read_bytes() == CONTENT


def test_what_never_arrives_is_said_and_the_part_stays(here, net, server):
    server.stops_after = [300_000] + [0] * 20
    with pytest.raises(RunError, match=r"ended at 300,000 of 1,024,000 bytes; 300,000 bytes are here, and the same"):
        fetch("net")
    assert state(net) == "incomplete" and names("weights") == ["net.pt.part", "net.pt.part.json"]
    server.stops_after = []
    fetch("net")
    assert server.asked[-1] == "bytes=300000-" and (here / "weights/net.pt").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("before", "after", "more"),
    [('"one"', '"two"', b""), ('"one"', '"two"', b"more"), ("", "", b"more"), ('W/"weak"', 'W/"weak"', b"more")],
)
def test_two_versions_are_never_joined(here, net, server, before, after, more):
    """Another file at the address since: another tag, or where there is no strong one another length."""
    server.tag, server.stops_after = before, [300_000] + [0] * 20
    with pytest.raises(RunError):
        fetch("net")
    server.content, server.tag, server.stops_after = CONTENT[::-1] + more, after, []
    fetch("net")
    assert (here / "weights/net.pt").read_bytes() == CONTENT[::-1] + more


def test_a_shorter_file_since_is_fetched_anew(here, net, server):
    server.tag, server.stops_after = "", [300_000] + [0] * 20
    with pytest.raises(RunError):
        fetch("net")
    server.content, server.stops_after = CONTENT[:1000], []
    fetch("net")
    assert (here / "weights/net.pt").read_bytes() == CONTENT[:1000]


def test_a_part_that_nobody_knows_is_not_continued(here, net, server):
    put(here / "weights/net.pt.part", b"of something else")
    fetch("net")
    assert server.asked == [None] and (here / "weights/net.pt").read_bytes() == CONTENT


def test_a_server_that_sends_another_piece_is_not_believed(here, net, server):
    server.stops_after, server.shift = [300_000], 7
    fetch("net")
    assert server.asked == [None, "bytes=300000-", None] and (here / "weights/net.pt").read_bytes() == CONTENT


def test_the_wrong_hash_leaves_nothing(here, net, monkeypatch):
    change(monkeypatch, net, sha256="00000000")
    with pytest.raises(UserError, match=r"a file whose SHA-256 does not begin with the published 00000000; nothing"):
        fetch("net")
    assert names("weights") == []
    change(monkeypatch, net, sha256=SHA256[:10])
    assert fetch("net")["hash"] == "hash as published"


@pytest.mark.parametrize("size, told", [((1_024_001, 1_024_009), "gave 1,024,000 bytes, not the published 1,024,001")])
def test_the_wrong_size_leaves_nothing(here, net, monkeypatch, size, told):
    change(monkeypatch, net, size=size)
    with pytest.raises(UserError, match=told):
        fetch("net")
    assert names("weights") == []
    change(monkeypatch, net, size=(1_024_000, 1_024_000))
    assert fetch("net")["fetched"]


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"status": 404}, "says 404 Not Found"),
        ({"status": 503}, "says 503"),
        ({"kind": "text/html; charset=utf-8"}, "answers with a web page, not a file"),
    ],
)
def test_what_the_server_refuses_is_one_line_that_says_what_to_put_where(here, net, server, wrong, told):
    vars(server).update(wrong)
    with pytest.raises(UserError) as refused:
        fetch("net")
    assert told in str(refused.value) and "\n" not in str(refused.value)
    assert f"fetch {server.url} elsewhere, and put it at weights/net.pt" in str(refused.value)
    assert names("weights") == []


def test_without_a_network_one_line_says_what_to_put_where(here, net, server, monkeypatch):
    gone = Server()
    gone.server_close()  # nobody listens there now
    change(monkeypatch, net, location=gone.url)
    with pytest.raises(
        UserError, match=r"cannot reach 127\.0\.0\.1:\d+ \(.*\); fetch http://.* elsewhere, and put it at"
    ):
        fetch("net")
    assert names("weights") == []


def test_a_network_that_is_gone_in_the_middle_can_come_back(here, net, server, monkeypatch):
    server.stops_after = [300_000] + [0] * 20
    with pytest.raises(RunError):
        fetch("net")
    about = json.loads((here / "weights/net.pt.part.json").read_text())
    gone = Server()
    gone.server_close()
    change(monkeypatch, net, location=gone.url)
    (here / "weights/net.pt.part.json").write_text(json.dumps(about | {"url": gone.url}))
    with pytest.raises(RunError, match=r"cannot reach .*; 300,000 bytes are here, and the same command goes on"):
        fetch("net")


def test_a_file_in_the_way_is_not_replaced(here, net, monkeypatch):
    change(monkeypatch, net, size=(1_024_000, 1_024_000))
    put(here / "weights/net.pt", b"mine")
    with pytest.raises(UserError, match=r"weights/net\.pt is there but is not whole: delete it"):
        fetch("net")
    assert (here / "weights/net.pt").read_bytes() == b"mine"


def test_a_licence_for_non_commercial_use_has_to_be_accepted_first(here, net, server, monkeypatch):
    change(monkeypatch, net, licence="CC BY-NC 4.0")
    with pytest.raises(UserError, match=r"net: licence: CC BY-NC 4.0; if you keep to that, say --accept-licence"):
        fetch("net")
    assert server.asked == [] and not (here / "weights").exists()
    assert fetch("net", accept_licence=True)["fetched"]


@pytest.mark.parametrize("key", [a.key for a in ASSETS.values() if a.source == "browser"])
def test_a_link_for_browsers_is_told_and_not_followed(here, key):
    asset = ASSETS[key]
    with pytest.raises(UserError) as refused:
        fetch(key)
    for words in (asset.page, f"weights/{asset.name}", asset.licence, *asset.holds):
        assert words in str(refused.value)
    assert "\n" not in str(refused.value) and not list(here.iterdir())


def test_an_unknown_asset_is_refused_with_the_nearest(here):
    with pytest.raises(UserError, match=r"'adm-265': no such asset; did you mean 'adm-256'"):
        fetch("adm-265")


def test_two_at_once_are_one(here, net, server):
    server.stops_after = [-1]
    first = threading.Thread(target=fetch, args=("net",), daemon=True)
    first.start()
    wait_for(lambda: (here / "weights/net.pt.part").exists() and (here / "weights/net.pt.part").stat().st_size)
    with pytest.raises(UserError, match="is being fetched by another process"):
        fetch("net")
    server.hold.set()
    first.join(30)
    assert (here / "weights/net.pt").read_bytes() == CONTENT


def wait_for(reached, timeout=30):
    end = time.monotonic() + timeout
    while not reached():
        assert time.monotonic() < end
        time.sleep(0.005)


# From the Hub


@pytest.fixture
def hub(monkeypatch):
    """A Hub of one repository; it notes what it is asked for."""
    import huggingface_hub

    asked, held = [], {}

    def snapshot_download(repository, local_dir, allow_patterns):
        from fnmatch import fnmatch

        asked.append((repository, allow_patterns))
        put(Path(local_dir) / ".cache/huggingface/notes", b"x")
        for name, content in held.items():
            if any(fnmatch(name, pattern) for pattern in allow_patterns):
                put(Path(local_dir) / name, content)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked, held


def test_a_folder_of_the_hub_takes_its_place_whole(here, hub):
    asked, held = hub
    held.update({"config.json": b"{}", "model.safetensors": b"1", "model.bin": b"1", "picture.png": b"2"})
    found = fetch("ddpm-cifar10-32")
    assert found["path"] == "weights/ddpm-cifar10-32" and found["hash"] == "hash recorded"
    assert names("weights") == ["ddpm-cifar10-32"] and [repository for repository, _ in asked] == [
        "google/ddpm-cifar10-32"
    ]
    assert names("weights/ddpm-cifar10-32") == ["config.json", "model.safetensors", "model.safetensors.sha256.json"]


def test_an_old_repository_has_no_safetensors(here, hub):
    hub[1].update({"config.json": b"{}", "model.bin": b"1"})
    fetch("sd-vae-mse")
    assert names("weights/sd-vae-mse") == ["config.json", "model.bin", "model.bin.sha256.json"]


def test_a_file_of_the_hub_gets_its_place(here, hub, monkeypatch):
    change(monkeypatch, ASSETS["addp-vit-base-16"], size=(3, 3))
    hub[1].update({"addp-vit-base-16.pth": b"abc", "addp-vit-large-16.pth": b"defg"})
    assert fetch("addp-vit-base-16", accept_licence=True)["path"] == "weights/addp-vit-base-16.pth"
    assert (here / "weights/addp-vit-base-16.pth").read_bytes() == b"abc"
    assert names("weights") == ["addp-vit-base-16.pth", "addp-vit-base-16.pth.sha256.json"]


def test_a_repository_that_does_not_hold_it(here, hub):
    hub[1].update({"README.md": b"moved"})
    with pytest.raises(UserError, match="google/ddpm-cifar10-32 on the Hub does not hold it whole"):
        fetch("ddpm-cifar10-32")
    assert not (here / "weights/ddpm-cifar10-32").exists()


def test_without_the_hub_one_line_says_what_to_put_where(here, monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def offline(*_args, **_named):
        raise LocalEntryNotFoundError("no connection\nand a long text")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(UserError) as refused:
        fetch("addp-vit-base-16", accept_licence=True)
    words = "fetch Changyao/ADDP, addp-vit-base-16.pth, elsewhere, and put it at weights/addp-vit-base-16.pth"
    assert words in str(refused.value) and "\n" not in str(refused.value)


# As commands


def prepared(folder, server):
    """The child process has to know the asset too."""
    (folder / "published.py").write_text(
        "from diffrep.assets import ASSETS, Asset\n"
        f"def add():\n    ASSETS['net'] = Asset('net', {server.url!r}, 'a licence', 'net.pt', 'tests')\n"
    )
    return {"TEST_PREPARE": "published:add"}


def test_killed_in_the_middle_the_same_command_goes_on(here, server):
    server.stops_after = [-1]
    running = commands.Command(here, "assets", "fetch", "net", **prepared(here, server))
    part = here / "weights/net.pt.part"
    running.until(lambda: part.exists() and part.stat().st_size >= 500_000)
    running.send(signal.SIGKILL)
    assert running.wait().code == -9
    server.hold.set()
    kept = part.stat().st_size
    assert part.read_bytes() == CONTENT[:kept] and not (here / "weights/net.pt").exists()
    done = commands.run(here, "assets", "fetch", "net", **prepared(here, server))
    assert done.code == 0 and server.asked == [None, f"bytes={kept}-"]
    assert (here / "weights/net.pt").read_bytes() == CONTENT
    assert "net: fetched: weights/net.pt (hash recorded)" in done.out and "net: licence: a licence" in done.err


def test_ctrl_c_leaves_the_part(here, server):
    server.stops_after = [-1]
    running = commands.Command(here, "assets", "fetch", "net", **prepared(here, server))
    part = here / "weights/net.pt.part"
    running.until(lambda: part.exists() and part.stat().st_size >= 500_000)
    running.send(signal.SIGINT)
    done = running.wait()
    assert done.code == 130 and "Traceback" not in done.err and part.stat().st_size >= 500_000


def test_a_full_disk_is_one_line(here, server):
    done = commands.run(here, "assets", "fetch", "net", TEST_FILE_LIMIT="400000", **prepared(here, server))
    assert done.code == 3 and done.err.strip().splitlines()[-1].startswith("diffrep: cannot write weights/net.pt")
    assert not (here / "weights/net.pt").exists()


def test_the_list_says_state_place_and_licence(here):
    put(here / "weights/64x64_diffusion.pt")
    put(here / "weights/DiT-XL-2-256x256.pt.part")
    done = commands.run(here, "assets")
    assert done.code == 0
    rows = {line.split()[0]: line for line in done.out.splitlines() if line.strip()}
    assert re.search(r"\] +here +weights/64x64_diffusion\.pt$", rows["adm-64"]) and "296 M parameters" in rows["adm-64"]
    assert (
        "incomplete" in rows["dit-xl-2-256"] and "not here" in rows["adm-128"] and "3.5 GB" in rows["addp-vit-large-16"]
    )
    number = re.search(r"\[\d+\]", rows["dit-xl-2-256"])[0]
    assert f"{number} CC BY-NC 4.0, non-commercial" in done.out
    assert max(map(len, done.out.splitlines())) <= 140


def test_programs_get_the_list_too(here):
    put(here / "weights/64x64_diffusion.pt")
    check_or_record(here / "weights/64x64_diffusion.pt")
    done = commands.run(here, "assets", "--json")
    found = {row["key"]: row for row in json.loads(done.out)}
    assert found.keys() == ASSETS.keys() == {row["key"] for row in listing()}
    assert found["adm-64"]["state"] == "here" and found["adm-64"]["recorded_sha256"] == hashlib.sha256(b"x").hexdigest()
    assert found["adm-128"] | {"state": "not here", "path": "weights/128x128_diffusion.pt"} == found["adm-128"]


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["mage-vitb-1600"], "1Q6tbt3vF0bSrv5sPrjpFu8ksG3vTsVX2"),
        (["dit-xl-2-256"], "say --accept-licence"),
        (["nothing"], "no such asset"),
    ],
)
def test_what_cannot_be_fetched_exits_with_two(here, arguments, told):
    done = commands.run(here, "assets", "fetch", *arguments)
    assert done.code == 2 and told in done.line and done.out == "" and not list(here.iterdir())
