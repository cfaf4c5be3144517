"""What may be named as a source: one spelling of it, below what is allowed, and nothing that could mean another."""

from pathlib import Path

import pytest

from service.source_urls import AllowedSources, source_of, store_of


@pytest.mark.parametrize(
    ("text", "path", "revision", "url"),
    [
        ("file:///srv/adapters/poet/", ("srv", "adapters", "poet"), None, "file:///srv/adapters/poet"),
        ("file:///srv/my%20poet", ("srv", "my poet"), None, "file:///srv/my%20poet"),
        ("/srv/my poet", ("srv", "my poet"), None, "file:///srv/my%20poet"),
        ("s3://bucket", ("bucket",), None, "s3://bucket"),
        ("s3://my-bucket.v2/a/b_c=d/", ("my-bucket.v2", "a", "b_c=d"), None, "s3://my-bucket.v2/a/b_c=d"),
        ("s3://bucket/run 3/für", ("bucket", "run 3", "für"), None, "s3://bucket/run%203/f%C3%BCr"),
        ("s3://bucket/run%203/f%c3%bcr", ("bucket", "run 3", "für"), None, "s3://bucket/run%203/f%C3%BCr"),
        (
            "s3://bucket/2026-01-02T03:04:05.6Z/@(a,b)'!",
            ("bucket", "2026-01-02T03:04:05.6Z", "@(a,b)'!"),
            None,
            "s3://bucket/2026-01-02T03%3A04%3A05.6Z/%40%28a%2Cb%29%27%21",
        ),
        ("s3://bucket/50%/a%3Fb%23c%25", ("bucket", "50%", "a?b#c%"), None, "s3://bucket/50%25/a%3Fb%23c%25"),
        ("s3://bucket/" + "k" * 300, ("bucket", "k" * 300), None, "s3://bucket/" + "k" * 300),
        ("hf://org/repo/a b/ключ%40@v1", ("org", "repo", "a b", "ключ@"), "v1", None),
        ("hf://org/repo", ("org", "repo"), None, "hf://org/repo"),
        ("hf://Org/re.po-1/fold/er@v1.0", ("Org", "re.po-1", "fold", "er"), "v1.0", "hf://Org/re.po-1/fold/er@v1.0"),
        ("hf://org/repo@refs/pr/1", ("org", "repo"), "refs/pr/1", "hf://org/repo@refs/pr/1"),
    ],
)
def test_a_source_has_one_spelling(text: str, path: tuple[str, ...], revision: str | None, url: str | None) -> None:
    source = source_of(text)
    assert (source.path, source.revision, source.url) == (path, revision, url or source.url)
    assert source_of(source.url) == source


REFUSED = [
    *("", "poet", "org/repo", "../poet", "//host/share", "s3:bucket", "s3:/bucket/x", "://bucket/x"),
    *("http://169.254.169.254/latest", "https://example.com/x", "ftp://host/x", "gopher://host", "data:,x"),
    *("S3://bucket/x", "Hf://org/repo", "FILE:///srv", " s3://bucket/x", "s3://bucket/x\n", "s3+http://bucket/x"),
    *("file://host/srv", "file://localhost/srv", "file://user@/srv", "file:srv", "file:/srv", "file://", "file:////srv"),
    *("file:///srv/../etc", "file:///srv/./x", "file:///srv//x", "file:///srv/%2e%2e/etc", "file:///srv/%2E%2E/etc"),
    *("file:///srv%2fx", "file:///srv%5c..", "file:///srv/%00", "file:///srv/a\0b", "file:///srv/%252e%252e", "file:///%"),
    *("file:///srv?x", "file:///srv#x", "file:///srv/%0a", "file:///srv/\n", "/srv/../etc", "/srv/%2e%2e", "file:///%ff"),
    *("s3://", "s3:///x", "s3://b", "s3://Bucket/x", "s3://bucket/../x", "s3://bucket//x", "s3://bucket/%2e%2e/x"),
    *("s3://bucket/x?versionId=1", "s3://bucket/x#y", "s3://bucket:443/x", "s3://key:secret@bucket/x", "s3://@bucket/x"),
    *("s3://10.0.0.1/x", "s3://169.254.169.254/x", "s3://buck..et/x", "s3://bucket-/x", "s3://-bucket/x", "s3://a_b/x"),
    *("s3://arn:aws:s3:us-east-1:1:accesspoint/x", "s3://arn%3Aaws%3As3/x", "s3://name-s3alias/x", "s3://x--ol-s3/x"),
    *("s3://name--x-s3/x", "s3://alias.mrap/x", "s3://xn--bucket/x", "s3://https://host/x", "s3://bucket\\x", "s3://bücket/x"),
    *("s3://bucket/a%0ab", "s3://bucket/%ff", "s3://bucket/a\0", "s3://" + "b" * 64 + "/x", "s3://bucket/" + "k" * 999),
    *("s3://bucket/a/%2E/b", "s3://bucket/a%2fb", "s3://bucket/a%5cb", "s3://bucket/.", "s3://bucket/a/%2e.", "s3://bucket/a%7f"),
    *("hf://", "hf://org", "hf://org/", "hf://org//repo", "hf:///org/repo", "hf://org/..", "hf://../repo", "hf://org/re..po"),
    *("hf://org/repo/../other", "hf://org/repo/%2e%2e", "hf://org/repo?x=1", "hf://org/repo#x", "hf://org:443/repo"),
    *("hf://user@org/repo", "hf://user:token@org/repo", "hf://org/repo@", "hf://org/repo@a@b", "hf://org/repo@../x"),
    *("hf://org/repo@/x", "hf://org/repo@x/", "hf://org/repo@a b", "hf://org/repo@a%2fb", "hf://org/.repo", "hf://org/-r"),
    *("hf://org/repo/a%2f..", "hf://org/репо", "hf://org/repo@x?y", "hf://or%67/repo", "hf://org/repo/\ud800"),
]  # fmt: skip


@pytest.mark.parametrize("text", REFUSED)
def test_what_could_mean_another_place_is_no_source(text: str) -> None:
    with pytest.raises(ValueError, match=r"^\S.* "):
        source_of(text)


@pytest.mark.parametrize(
    ("allowed", "inside", "outside"),
    [
        ("s3://bucket", ["s3://bucket", "s3://bucket/x/y"], ["s3://bucket2/x", "s3://bucke", "hf://bucket/x"]),
        ("s3://bucket/team-a/", ["s3://bucket/team-a/x"], ["s3://bucket", "s3://bucket/team-ab/x", "s3://bucket/team"]),
        ("s3://bucket/a b", ["s3://bucket/a%20b/x", "s3://bucket/a b"], ["s3://bucket/a%2520b", "s3://bucket/a"]),
        ("hf://org", ["hf://org/a", "hf://org/b/c@main"], ["hf://Org/a", "hf://org2/a", "hf://o/org"]),
        ("hf://org/a", ["hf://org/a", "hf://org/a/b@main"], ["hf://org/ab", "hf://org/b", "hf://org/A"]),
    ],
)
def test_a_place_allows_what_is_below_it_by_whole_names(allowed: str, inside: list[str], outside: list[str]) -> None:
    places = AllowedSources([allowed])
    assert all(places.place_of(source_of(url)) for url in inside)
    assert not any(places.place_of(source_of(url)) for url in outside)


def test_a_directory_allows_what_is_below_it(tmp_path: Path) -> None:
    (tmp_path / "a b").mkdir()
    places = AllowedSources([f"file://{tmp_path}/a%20b", "s3://bucket"])
    assert places.place_of(source_of(f"{tmp_path}/a b/x"))
    assert not places.place_of(source_of(f"{tmp_path}/a"))
    assert not AllowedSources([]).place_of(source_of("file:///"))


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        ("file:///nowhere/at/all", "is not a directory"),
        ("/tmp", "is not accepted"),
        ("s3://Bucket", "is not the name of a bucket"),
        ("hf://org/repo@main", "must name no revision"),
        ("hf://", "is not the name of an organisation"),
        ("https://example.com", "is not accepted"),
        ("*", "is not accepted"),
    ],
)
def test_a_place_that_is_none_is_refused_with_a_sentence(url: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        AllowedSources([url])


def test_a_store_is_a_bucket() -> None:
    assert store_of("s3://bucket/rootstock/").url == "s3://bucket/rootstock"
    for url in ("hf://org/repo", "file:///srv", "bucket", "s3://Bucket"):
        with pytest.raises(ValueError, match=r"^\S.* "):
            store_of(url)
