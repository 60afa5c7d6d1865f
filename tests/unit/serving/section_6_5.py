"""Faults and bad inputs of the specification's §6.5, each with the tests that show its answer; what no test shows says why.

`file::test[case]`: the file below `tests/unit/serving` (with a slash: below `tests`), and a word that one of its cases has.
"""

from __future__ import annotations

BYTES, CODED, FETCH, WHERE = (
    "test_images_bytes.py",
    "test_images_encoding.py",
    "test_fetch.py",
    "test_fetch_where.py",
)
ADDRESSES, HOSTILE, PROTOCOL = (
    "test_fetch_addresses.py",
    "test_hostile_requests.py",
    "test_border_protocol.py",
)
STRANGERS, BATCHER, LOOP = "test_strangers.py", "test_batcher.py", "test_chat_loop.py"
PRETRAIN = "e2e/test_pretrain_local.py"
CLIENTS, RAY, SCALE = "e2e/test_clients.py", "e2e/test_serve_ray.py", "e2e/test_serve_autoscale.py"

READ, REFUSED = f"{BYTES}::test_what_is_read", f"{BYTES}::test_what_is_refused"
IMAGES: dict[str, str] = {
    "empty bytes": f"{REFUSED}[empty]",
    "1x1": f"{READ}[one pixel]",
    "1xN": f"{READ}[one row]",
    "Nx1": f"{READ}[one column]",
    "JPEG and PNG cut anywhere": f"{BYTES}::test_a_picture_cut_anywhere_is_refused_or_whole",
    "wrong checksum": f"{REFUSED}[wrong checksum of the pixels]",
    "PNG bomb of 1 bit": f"{REFUSED}[png bomb]",
    "huge sizes in the header": f"{REFUSED}[png of two sides of 2^31]",
    "zlib bomb in iCCP": f"{REFUSED}[zlib bomb in iCCP]",
    "zlib bomb in zTXt": f"{REFUSED}[zlib bomb in zTXt]",
    "animated GIF": f"{READ}[animated gif: the first frame]",
    "animated WebP": f"{READ}[animated webp: the first frame]",
    "animated PNG": f"{READ}[animated png: the first frame]",
    "CMYK JPEG": f"{READ}[jpeg cmyk]",
    "YCCK JPEG": f"{READ}[jpeg ycck]",
    "16 bits": f"{BYTES}::test_sixteen_bits_become_the_nearest_eight",
    "float TIFF": f"{REFUSED}[float tiff]",
    "palette and transparency": f"{READ}[palette with transparency]",
    "LA": f"{READ}[grey with alpha]",
    "RGBA": f"{READ}[rgba]",
    "EXIF 1 to 8": f"{BYTES}::test_exif_turns_the_picture_upright",
    "broken EXIF": f"{BYTES}::test_broken_exif_turns_nothing",
    "progressive JPEG": f"{READ}[jpeg progressive]",
    "12-bit JPEG": f"{REFUSED}[twelve bits]",
    "SVG": f"{REFUSED}[svg]",
    "HEIC": f"{REFUSED}[heic]",
    "PDF": f"{REFUSED}[pdf]",
    "HTML": f"{REFUSED}[html]",
    "wrong declared type": f"{CODED}::test_spellings_that_give_the_bytes[a wrong type]",
    "two formats in one": f"{READ}[an archive behind the jpeg]",
    "start of a JPEG alone": f"{REFUSED}[start of a jpeg]",
    "any damage": "test_images_fuzz.py::test_much_damage_gives_pixels_or_an_answer",
    "no growth": "test_images_fuzz.py::test_nothing_grows_and_nothing_is_printed",
    "the same over HTTP": f"{HOSTILE}::test_bad_images",
}

GIVE, NONE = f"{CODED}::test_spellings_that_give_the_bytes", f"{CODED}::test_spellings_that_are_refused"
ENCODING: dict[str, str] = {
    "base64 with line breaks": f"{GIVE}[lines of 76, CRLF]",
    "URL-safe letters": f"{GIVE}[URL-safe]",
    "no padding": f"{GIVE}[unpadded]",
    "a garbage tail": f"{NONE}[garbage behind]",
    "no ;base64": f"{NONE}[no ;base64]",
    "percent-encoded": f"{GIVE}[percent-encoded base64]",
    "a charset": f"{GIVE}[charset]",
    "upper-case scheme": f"{GIVE}[upper case]",
    "empty payload": f"{NONE}[empty]",
    "image_url as a plain string": f"{CODED}::test_a_plain_string_in_image_url_is_a_picture",
    "a whole body of it": f"{CODED}::test_a_full_body_is_judged_in_bounded_time_and_memory",
}

NOT_READ, NOT_PUBLIC = (
    f"{ADDRESSES}::test_addresses_that_are_not_read",
    f"{ADDRESSES}::test_numbers_that_are_not_public",
)
UNSOUND, LISTED = f"{FETCH}::test_unsound_answers", f"{WHERE}::test_what_is_not_listed_is_not_looked_up"
URL: dict[str, str] = {
    "127.0.0.1": f"{LISTED}[http://127.0.0.1/]",
    "localhost": f"{WHERE}::test_the_systems_resolver_and_the_real_rule_keep_this_machine_out",
    "[::1]": f"{NOT_READ}[http://[::1]/]",
    "0.0.0.0": f"{LISTED}[http://0.0.0.0/]",
    "169.254.169.254": f"{NOT_PUBLIC}[169.254.169.254]",
    "::ffff:127.0.0.1": f"{NOT_PUBLIC}[::ffff:127.0.0.1]",
    "2130706433": f"{NOT_READ}[http://2130706433/]",
    "0x7f.1": f"{NOT_READ}[http://0x7f.1/]",
    "10/8": f"{NOT_PUBLIC}[10.0.0.1]",
    "fc00::/7": f"{NOT_PUBLIC}[fc00::1]",
    "a name of a private address": f"{WHERE}::test_a_listed_host_at_an_address_inside_is_refused",
    "rebinding": f"{WHERE}::test_a_name_that_changes_its_mind_is_asked_once",
    "redirect inside": f"{UNSOUND}[moved inside]",
    "redirects in circles": f"{UNSOUND}[moved in circles]",
    "file://": f"{NOT_READ}[file:///etc/passwd]",
    "ftp://": f"{NOT_READ}[ftp://a.b/c]",
    "userinfo": f"{NOT_READ}[https://a.b@evil.example/]",
    "IDNA": f"{ADDRESSES}::test_addresses_that_are_read[https://bücher.example/ä.png?ö]",
    "slow-loris": f"{UNSOUND}[slow head]",
    "endless body": f"{UNSOUND}[endless]",
    "lying length": f"{UNSOUND}[shorter than its header]",
    "gzip bomb": f"{UNSOUND}[gzip bomb]",
    "404": f"{UNSOUND}[not found]",
    "HTML for a picture": f"{REFUSED}[html]",
    "IPv6 alone": f"{WHERE}::test_a_host_that_has_ipv6_alone",
}

BODIES, LABELS = f"{HOSTILE}::test_bad_bodies", f"{HOSTILE}::test_bad_labels"
ODD = f"{STRANGERS}::test_odd_texts_are_only_texts_to_every_model"
TEXT: dict[str, str] = {
    "empty": f"{BODIES}[empty string]",
    "white space": f"{BODIES}[white space]",
    "null byte": f"{ODD}[null byte]",
    "lone surrogates": f"{HOSTILE}::test_raw_bodies[lone surrogate]",
    "lone surrogates in a chat": "test_chat.py::test_bad_bodies[half a surrogate]",
    "more than 77 tokens": "test_clip_engine.py::test_a_long_text_is_cut_and_says_so",
    "a megabyte": f"{STRANGERS}::test_a_megabyte_of_text_is_refused_at_once",
    "control tokens": f"{ODD}[control tokens]",
    "control tokens of a conversation": "test_chat.py::test_forged_marks_end_no_turn_and_bring_no_picture",
    "right to left": f"{ODD}[right to left]",
    "emoji": f"{ODD}[emoji]",
    "token ids": f"{BODIES}[token ids]",
    "token ids as LangChain sends them": f"{CLIENTS}::test_langchain_and_llamaindex",
    "lists of token ids": f"{BODIES}[lists of token ids]",
    "2049 inputs": f"{BODIES}[2049 inputs]",
    "mixed types": f"{BODIES}[nested lists]",
    "no labels": f"{LABELS}[empty]",
    "a label twice": f"{LABELS}[twice]",
    "one label and a thousand": f"{STRANGERS}::test_counts_beyond_everything_are_all",
    "1001 labels": f"{LABELS}[1001]",
    "template without {}": f"{LABELS}[template without a place]",
    "template of format tricks": f"{ODD}[braces]",
    "template is no format string": "test_label_vectors.py::test_templates_are_not_format_strings",
}

LINES, EXTREMES = (
    f"{PROTOCOL}::test_every_line_has_its_answer",
    f"{STRANGERS}::test_extremes_are_refused_in_a_line",
)
PROTOCOL_LINES: dict[str, str] = {
    "bad JSON": f"{LINES}[bad json]",
    "deep nesting": f"{LINES}[as deep as the body is long]",
    "a key twice": f"{PROTOCOL}::test_the_last_of_two_keys_counts",
    "NaN": f"{HOSTILE}::test_raw_bodies[NaN]",
    "Infinity": f"{HOSTILE}::test_raw_bodies[infinity]",
    "wrong content type": f"{LINES}[wrong content type]",
    "no model": f"{BODIES}[nothing]",
    "unknown model": "test_http_surface.py::test_another_model_is_not_found",
    "a model of another kind": "test_chat_models.py::test_routes_of_another_kind_say_what_is_served",
    "extra fields": "test_http_surface.py::test_the_reply_is_openais",
    "n": f"{EXTREMES}[n of 4000 digits]",
    "max_tokens": f"{EXTREMES}[tokens of 4000 digits]",
    "temperature": f"{EXTREMES}[temperature is endless]",
    "negatives": f"{EXTREMES}[tokens below nothing]",
    "extremes that are fine": f"{STRANGERS}::test_extremes_that_are_answered",
    "stream with tools": f"{EXTREMES}[a stream with tools]",
    "HEAD": f"{PROTOCOL}::test_head_is_get_without_a_body",
    "OPTIONS": f"{LINES}[OPTIONS]",
    "wrong method": f"{PROTOCOL}::test_a_refused_method_names_the_ones_that_are_taken",
    "chunks without a length": f"{LINES}[chunks without a length]",
    "100-continue": f"{PROTOCOL}::test_who_asks_first_is_told_to_go_on_or_not_to_begin",
    "pipelined": f"{PROTOCOL}::test_pipelined_requests_are_answered_in_order",
    "header injection": f"{PROTOCOL}::test_nothing_is_smuggled_into_a_header",
    "huge headers": f"{LINES}[4000 headers]",
    "who leaves before the batch": f"{STRANGERS}::test_who_leaves_spares_the_model",
    "who leaves while it is computed": f"{BATCHER}::test_a_client_that_left_costs_nothing",
    "who leaves a stream": f"{STRANGERS}::test_who_leaves_a_stream_ends_the_answer",
    "who leaves before his first token": f"{STRANGERS}::test_who_leaves_before_his_turn_is_not_begun",
    "storm of connections": f"{PROTOCOL}::test_a_storm_of_connections_passes",
    "HTTP/1.0": f"{PROTOCOL}::test_http_1_0_ends_its_connection",
    "everything that the document rules out": "test_schemathesis.py::test_every_route_with_every_check",
}

LOAD: dict[str, str] = {
    "burst": f"{STRANGERS}::test_a_crowd_is_answered_or_told_to_come_back",
    "burst of bytes": f"{BATCHER}::test_bytes_are_bounded_too",
    "burst of conversations": f"{LOOP}::test_a_full_house_answers_429",
    "burst of bodies": "test_border_room.py::test_what_has_no_room_is_refused_at_once_and_those_inside_are_answered",
    "a client that waits as it is told": f"{CLIENTS}::test_a_full_server_is_asked_again_when_it_said",
    "small and huge pictures": f"{STRANGERS}::test_small_pictures_pass_huge_ones",
    "small and large requests": f"{BATCHER}::test_a_long_request_lets_others_through",
    "cancelled is not computed": f"{CLIENTS}::test_a_client_that_gives_up_is_not_computed_for",
    "too late is not computed": f"{CLIENTS}::test_a_late_answer_is_asked_for_again",
    "slow reader of a stream": f"{STRANGERS}::test_a_slow_reader_gets_everything_and_keeps_nobody",
    "who does not read at all": f"{STRANGERS}::test_who_asks_and_does_not_read_is_left",
}  # fmt: skip

PROCESS: dict[str, str] = {
    "replica killed in a batch": f"{RAY}::test_a_killed_replica_under_load_costs_a_retrying_client_nothing",
    "a model that hangs": "test_shelf.py::test_ready_is_a_model_that_answers",
    "too little memory for a batch": f"{BATCHER}::test_too_little_memory_for_a_batch_halves_it",
    "too little memory for all conversations": f"{LOOP}::test_too_little_memory_for_all_lets_some_wait",
    "device assert": "test_border.py::test_an_unexpected_failure_tells_nothing_and_is_not_retried",
    "constructor failure, then fixed": "test_shelf.py::test_a_change_that_cannot_be_made_changes_nothing",
    "rolling upgrade under load": f"{RAY}::test_a_new_checkpoint_and_new_code_under_load_lose_no_request",
    "a new checkpoint in one process": "test_shelf.py::test_a_new_checkpoint_takes_over_and_no_request_is_lost",
    "from nothing to one replica": f"{SCALE}::test_an_endpoint_scales_to_four_nodes_to_none_and_back",
    "a typo in a configuration": "unit/checks/test_mutants.py::test_all_mutants_are_named",
    "weights missing": "test_damaged_models.py::test_it_does_not_start[missing]",
    "weights corrupt": "test_damaged_models.py::test_it_does_not_start[cut]",
    "weights that are no numbers": "test_damaged_models.py::test_it_does_not_start[not_numbers]",
    "weights that become no numbers": "test_chat_models.py::test_a_model_that_breaks_later_is_the_servers_failure",
    "SIGTERM with a request in flight": "e2e/test_serving.py::test_sigterm_lets_a_request_in_flight_be_answered",
    "disk full at a checkpoint": f"{PRETRAIN}::test_a_full_disk_names_itself_and_the_last_good_checkpoint_survives",
    "killed between write and commit": f"{PRETRAIN}::test_killed_and_resumed_is_bit_equal",
    "resumed with other workers": "unit/data/test_loader.py::test_resume_in_the_middle_of_an_epoch_on_another_number_of_workers",
    "metrics under load": f"{RAY}::test_what_is_counted_reaches_rays_exporter_and_metrics",
}  # fmt: skip

OPEN: dict[str, str] = {
    "a GPU that does not start or hangs": "needs one: the first ends the start, the second is a model that hangs",
    "proxy or controller killed": "Ray's promise, with Ray's own tests; the runbook says what to do",
    "head restarted, with and without Redis": "the same",
    "node drained or preempted": "nodes go in the autoscaling scene; one that goes by force is a killed replica",
    "storage upload failure": "training's: a checkpoint without its manifest does not count",
    "clock jump": "deadlines and limits count the monotonic clock",
    "log rotation": "logs go to standard error; whoever keeps them rotates them",
    "overload for long": "`fmray benchmark serve` measures three times the capacity for a minute",
}
"""What has no test here, and why."""

GROUPS = {
    "images": IMAGES,
    "encoding": ENCODING,
    "url": URL,
    "text": TEXT,
    "protocol": PROTOCOL_LINES,
    "load": LOAD,
    "process": PROCESS,
}
