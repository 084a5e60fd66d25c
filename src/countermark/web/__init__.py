"""The room where people look at it: pages and a JSON API over a ledger, its verdicts and results.

settings  what is served, from where, within which limits; folders of which names alone are known
access    the token, sessions, and how often somebody may ask
gate      what every request has to pass, and what every answer bears
orders    what somebody asks for, as a document     runner  jobs: a process each, within limits
work      what such a process does                  rendering  another one: `results/` as JSON
claims    claims as they are shown, checked anew; who owns which
looks     templates and what they are given         results  what `rendering` made
site      all of these together, and what the routes take of them
pages, asking  HTML    api  JSON    app  the application    serving  the server

The server never imports torch: what needs it runs in a process of its own.
"""
