"""Lists of records in array_record files."""

import subprocess
import sys

from lit_fast.data.records import RecordWriter

CODE = """
import os, resource, sys
import lit_fast.data.records as records

records.FILE_RECORDS = 1
writer = records.RecordWriter(sys.argv[1])
for number in range(60):
    writer.write(b"%d" % number)
writer.close()
limit = len(os.listdir("/proc/self/fd")) + 24
resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
reader = records.RecordReader(sys.argv[1], 60)
print([int(reader.read(number)) for number in range(60)] == list(range(60)))
"""


def test_reader_with_a_low_limit_of_open_files_closes_the_files_that_it_read_first(tmp_path):
    done = subprocess.run([sys.executable, "-c", CODE, str(tmp_path)], capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr


def test_writer_deletes_what_a_killed_one_left(tmp_path):
    for name in ("00000.array_record", "00007.array_record", ".00001.array_record.12.tmp"):
        (tmp_path / name).touch()
    writer = RecordWriter(tmp_path)
    writer.write(b"x")
    writer.close()
    assert [path.name for path in tmp_path.iterdir()] == ["00000.array_record"]
