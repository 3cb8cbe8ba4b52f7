import pytest

from tokenlearner_keras.data.video_records import (
    VideoRecord,
    check_records,
    read_video_csv,
    read_video_folder,
)
from tokenlearner_keras.data.videos import VideoFaults


def touch(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")


def write(path, *lines):
    path.write_text("\n".join(lines) + "\n")
    return path


def test_folder_of_classes(tmp_path):
    touch(tmp_path, "walk/b.mp4", "walk/a.AVI", "walk/notes.txt", "run/deep/c.mkv")
    touch(tmp_path, "readme.md", ".hidden/x.mp4")
    records, names = read_video_folder(tmp_path)
    assert names == ["run", "walk"]
    assert [(r.path[len(str(tmp_path)) :], r.labels) for r in records] == [
        ("/run/deep/c.mkv", (0,)),
        ("/walk/a.AVI", (1,)),
        ("/walk/b.mp4", (1,)),
    ]
    records, names = read_video_folder(tmp_path, ["walk", "stand", "run"])
    assert [r.labels for r in records] == [(0,), (0,), (2,)]


def test_bad_folders(tmp_path):
    with pytest.raises(ValueError, match="must be a folder"):
        read_video_folder(tmp_path / "none")
    with pytest.raises(ValueError, match="a subfolder of videos for each class"):
        read_video_folder(tmp_path)
    touch(tmp_path, "walk/b.mp4")
    with pytest.raises(ValueError, match=r"Received: \['walk'\]"):
        read_video_folder(tmp_path, ["run"])


def test_csv_with_several_labels(tmp_path):
    touch(tmp_path, "a.mp4", "b.mp4", "c.mp4")
    path = write(
        tmp_path / "videos.csv",
        "path,labels",
        "a.mp4,sit; read",
        "b.mp4,read",
        "c.mp4,",
    )
    records, names = read_video_csv(path)
    assert names == ["read", "sit"]
    assert [r.labels for r in records] == [(1, 0), (0,), ()]
    assert records[0].targets(2).tolist() == [1, 1]
    assert records[2].targets(2).tolist() == [0, 0]


def test_csv_with_times(tmp_path):
    touch(tmp_path, "a.mp4")
    path = write(
        tmp_path / "videos.csv",
        "path,start,end,labels",
        "a.mp4,0.0,4.5,sit",
        "a.mp4,4.0,9.0,read",
        "a.mp4,,,indoors",
    )
    (record,), names = read_video_csv(path)
    assert names == ["indoors", "read", "sit"]
    assert record.targets(3).tolist() == [1, 1, 1]
    assert record.targets(3, 0.0, 2.0).tolist() == [1, 0, 1]
    assert record.targets(3, 5.0, 7.0).tolist() == [1, 1, 0]
    assert record.targets(3, 20.0, 21.0).tolist() == [1, 0, 0]


def test_csv_rows_that_name_no_file_are_counted(tmp_path):
    touch(tmp_path, "a.mp4")
    path = write(tmp_path / "videos.csv", "path,labels", "a.mp4,x", "lost.mp4,x;y")
    faults = VideoFaults()
    records, names = read_video_csv(path, faults=faults)
    assert [r.labels for r in records] == [(0,)]
    assert names == ["x", "y"]
    assert faults.files == {
        str(tmp_path / "lost.mp4"): ("missing", f"named by '{path}', line 3")
    }


def test_numbers_as_labels(tmp_path):
    touch(tmp_path, "a.mp4")
    path = write(tmp_path / "videos.csv", "path,labels", "a.mp4,0;2")
    with pytest.raises(ValueError, match="pass `class_names`"):
        read_video_csv(path)
    (record,), _ = read_video_csv(path, class_names=["x", "y", "z"])
    assert record.labels == (0, 2)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["file,class", "a.mp4,x"], r"Received: \['file', 'class'\]"),
        (["path,labels", "a.mp4,x;w"], "line 2.*Received: 'w'"),
        (["path,labels", "a.mp4,7"], "a number from 0 to 1. Received: '7'"),
        (["path,labels", "a.mp4,-1"], "Received: '-1'"),
        (["path,labels", "b.mp4,x"], "names no file that exists. Received: 1 rows"),
        (["path,labels,start,end", "a.mp4,x,3,1"], "start='3', end='1'"),
        (["path,labels,start,end", "a.mp4,x,now,"], "start='now', end=''"),
    ],
)
def test_bad_csv(lines, message, tmp_path):
    touch(tmp_path, "a.mp4")
    path = write(tmp_path / "videos.csv", *lines)
    with pytest.raises(ValueError, match=message):
        read_video_csv(path, class_names=["x", "y"])
    with pytest.raises(ValueError, match="must be a file"):
        read_video_csv(tmp_path / "none.csv")


def test_labels_out_of_range():
    records = [VideoRecord("a.mp4", (0,)), VideoRecord("b.mp4", (1, 5))]
    assert check_records(records, 6, True) == records
    with pytest.raises(
        ValueError,
        match=r"num_classes=5. Received: labels \(1, 5\) of 'b.mp4' \(1 of 2",
    ):
        check_records(records, 5, True)
    with pytest.raises(ValueError, match=r"must have one label.*\(1, 5\) of 'b.mp4'"):
        check_records(records, 6, False)
    with pytest.raises(ValueError, match="at least one video"):
        check_records([], 6, True)
