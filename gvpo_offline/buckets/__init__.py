"""Writing datasets to S3 buckets: `--output_dir s3://…`, and `--dataset s3://…` of other stages.

A command works on a *working copy* of the dataset in a local folder (`spool_dir`), with the code
and the guarantees of a local dataset, and what it finishes is uploaded. In Python:
`buckets.copy.working_copy`. Bottom up: `objects` makes the requests, `lease` keeps two writers
apart, `upload` and `copy` move files, `leftovers` finds what killed writers left.

**Order of a command.** Take the lease; download the manifests, the commit records, and the data
files that the newest version or an unfinished stage needs, each compared with its SHA-256; run the
stage on the working copy. Every second a thread uploads the tasks that the stage has committed:
first the files that a record names, then the record. At the end the rest is uploaded, the lease is
renewed, and the new manifest is put last. Then objects are deleted that the command deleted in its
working copy (`compact --remove_old true`), and the lease is released.

**Nothing is visible before the commit.** Readers take the newest manifest. It is put with
`If-None-Match: *`, so that version N is created by one writer, whole, after all objects it names.
An object is complete or absent: S3 shows no part of an unfinished put or multipart upload.

**A killed writer** leaves the version before readable, as well as the tasks it committed: the same
command goes on from them, from any machine. Data files and records never change: a data file's name
holds a hash of its content, and a record is put with `If-None-Match: *`. A working copy whose
upload failed stays, and the same command goes on from it while the bucket's newest version is
the same.

**Two writers.** `.lease.json` under the dataset's URL names the owner and for how many seconds the
lease holds after its last write. It is created with `If-None-Match: *`, and renewed, taken over and
released with `If-Match` on the ETag last seen. Its age is the difference of two times of the server
(`Date` of the answer, `Last-Modified` of the object), so that clocks of machines do not matter. A
second writer is refused with the name of the owner. A lease that was not renewed in time is taken
over by one of those who try, since one `If-Match` succeeds. A writer that was suspended meanwhile
finds out at its next renewal, which precedes each commit; should it be suspended between renewal
and commit, the conditional put of the manifest still lets one version N only exist.

**Lost answers.** A put that succeeded and whose answer was lost is tried again and fails on its
condition. The object is then read: the bytes that were to be put mean success.

**Conditions are tested** on the lease at the start of a command: a store that ignores them is
refused. Requests go through s3fs. The file systems of gs://, az:// and others have no common way to
replace an object on a condition, and are refused with the remedy.

One writer at a time writes to a dataset in a bucket, hence `--shard` is refused; `--workers` and
Ray with a `spool_dir` that its machines share run in parallel.
"""
