"""Claims: what makes a mark evidence. Who committed to which key, for which model, and when.

    statement   what is said: an in-toto Statement, one canonical JSON text
    signed      the file: the statement in a DSSE envelope (Ed25519), and its time stamps
    signing     Ed25519 keys and certificates as PEM files
    timestamp   RFC 3161 time stamps, believed of pinned authorities only
    tree        a Merkle tree that grows by a leaf at a time; its proofs
    database    the tables of a ledger (SQLite, PostgreSQL)
    rows        what is read of them, as hostile input
    ledger      an append-only list of claims: add, find, prove, sign its head
    audit       every row of a ledger against its tree, its heads and a checkpoint
    decision    what a policy is asked about, and what it says
    policy      what somebody accepts as evidence; nothing is trusted by default
    dispute     two owners, one suspect
    dating      by when the commitment of a key was in a ledger, and among how many

Nothing here needs torch. Names are loaded from their modules: claims need no database.
"""
