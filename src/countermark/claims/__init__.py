"""Claims: signed, timestamped statements that make a mark evidence.

A claim says who committed to which key, for which model, and when.

    statement   in-toto Statements, each with one canonical JSON text
    signed      the document on disk: a statement in a DSSE envelope (Ed25519) with its timestamps
    signing     Ed25519 keys and X.509 certificates as PEM files
    timestamp   RFC 3161 timestamps, which count only if a pinned authority signed them
    tree        a Merkle tree that grows leaf by leaf, with inclusion and consistency proofs
    database    the tables of a ledger (SQLite, PostgreSQL)
    rows        rows of these tables, read as hostile input
    ledger      an append-only list of claims: add, find, prove, sign its tree head
    growth      a proof that a newer tree head only adds claims to an older one
    audit       a check of every row of a ledger against its tree, its heads and a checkpoint
    decision    the case that a policy judges, and its decision
    policy      the checks that an examiner requires; nothing is trusted by default
    openssf     OpenSSF signatures over the model's file
    dispute     two owners who claim one suspect
    dating      by when a key's commitment was in a ledger, and among how many commitments

Nothing here needs torch. Import names from their modules: claims work without a database.
"""
