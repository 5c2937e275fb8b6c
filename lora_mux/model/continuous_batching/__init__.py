"""transformers' continuous batching: a request has the adapters that it was added with.

They are given with the call (`adapter_names=`), or are those in force where it is added. A manager
computes its batches in a thread of its own. A batch is one sample that holds the tokens of all
requests that are due, one request after the other.

request_rows  what a request asks for: its row, and the promise that its adapters stay
in_flight     the requests of a manager that are not over yet
lengths       how many tokens a request can have
overflows     a request whose adapters overflow fails alone
manager       put before transformers' manager: notes requests, and routes each batch by token
"""

from .manager import follow_requests as follow_requests
from .request_rows import requests_due as requests_due
from .request_rows import rows_of_requests as rows_of_requests
