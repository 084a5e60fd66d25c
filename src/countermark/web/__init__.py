"""The web server: HTML pages and a JSON API over a ledger, its claims and verdicts.

settings       what the server serves, and its limits; folders whose entries are chosen by name
access         the token, sessions, and the rate limit of each client address
gate           checks of every request, and security headers of every response
orders         a job and its request as stored documents
runner         the queue of jobs; each job runs in a process of its own, within limits
work           the program that such a process runs
claims         search in the claims, and a fresh check of each claim that is shown
looks          templates
site           the state of the application, which holds all of these parts
pages, asking  routes that answer with HTML
api            routes that answer with JSON
app, serving   the ASGI application, and the server that runs it

The server never imports torch. Code that needs torch runs in a process of its own.
"""
