"""Text that looks like a secret or like personal data, by its shape.

Every pattern takes time linear in the text: no repeat stands inside a repeat of the same characters, and all are
bounded. Shapes that chance often meets (card and account numbers) must also pass their check digits. It finds likely
cases, not all.
"""

from __future__ import annotations

import re

_SECRETS = {
    "private key": re.compile(r"-----BEGIN [A-Z ]{0,30}PRIVATE KEY"),
    "AWS access key": re.compile(r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"),
    "GitHub token": re.compile(r"\b(?:gh[pousr]_[A-Za-z0-9]{36}|github_pat_[A-Za-z0-9_]{22})"),
    "Slack token": re.compile(r"\bxox[abeoprs]-[A-Za-z0-9-]{10}"),
    "Google API key": re.compile(r"\bAIza[0-9A-Za-z_-]{35}"),
    "Hugging Face token": re.compile(r"\bhf_[A-Za-z0-9]{30}"),
    "Stripe key": re.compile(r"\b[rs]k_(?:live|test)_[0-9A-Za-z]{16}"),
    "API key": re.compile(r"\bsk-[A-Za-z0-9_-]{20}"),
    "JSON web token": re.compile(r"\beyJ[A-Za-z0-9_-]{8,300}\.eyJ[A-Za-z0-9_-]{8}"),
    "password or key assignment": re.compile(
        r"(?i)(?:password|passwd|secret|api[_-]?key|access[_-]?token)[\"']?[ \t]{0,4}[:=][ \t]{0,4}[\"']?"
        r"(?=[a-z_/+.-]{0,40}\d)[\w/+.-]{12}"
    ),
}
_EMAIL = re.compile(r"[A-Za-z0-9._%+-]{1,64}@[A-Za-z0-9-]{1,63}(?:\.[A-Za-z0-9-]{1,63}){1,5}")
_PHONES = (
    re.compile(r"(?<![\w.+])(?:\+?1[ .-])?(?:\(\d{3}\) ?|\d{3}[ .-])\d{3}[ .-]\d{4}(?![\w-])"),
    re.compile(r"(?<![\w+])\+\d[\d ().-]{6,18}\d(?!\w)"),
)
_CARD = re.compile(r"(?<![\w.-])[2-6]\d{3}(?:[ -]?\d){9,15}(?![\w-])")
_IBAN = re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b")
_SSN = re.compile(r"(?<![\w-])(?!000|666|9)\d{3}-(?!00)\d{2}-(?!0000)\d{4}(?![\w-])")


def secrets(text: str) -> list[str]:
    """Kinds of secrets whose shape occurs in `text`."""
    return [kind for kind, pattern in _SECRETS.items() if pattern.search(text)]


def personal_data(text: str) -> list[str]:
    """Kinds of personal data whose shape, and check digits where there are any, occur in `text`."""
    found = {
        "email address": "@" in text and _EMAIL.search(text) is not None,
        "phone number": any(_is_phone(match.group()) for pattern in _PHONES for match in pattern.finditer(text)),
        "payment card": any(_is_card(match.group()) for match in _CARD.finditer(text)),
        "bank account (IBAN)": any(_is_iban(match.group()) for match in _IBAN.finditer(text)),
        "US social security number": _SSN.search(text) is not None,
    }
    return [kind for kind, present in found.items() if present]


def _is_phone(text: str) -> bool:
    return 8 <= sum(character.isdigit() for character in text) <= 15


def _is_card(text: str) -> bool:
    """Luhn's check: ISO/IEC 7812-1."""
    digits = [int(character) for character in text if character.isdigit()][::-1]
    doubled = [sum(divmod(2 * digit, 10)) for digit in digits[1::2]]
    return 13 <= len(digits) <= 19 and len(set(digits)) > 1 and (sum(digits[::2]) + sum(doubled)) % 10 == 0


def _is_iban(text: str) -> bool:
    """The mod-97 check: ISO 13616-1."""
    groups = text.split(" ")
    # The pattern may have taken the next word for a last group.
    return any(_mod97("".join(groups[:count])) for count in {len(groups), max(1, len(groups) - 1)})


def _mod97(account: str) -> bool:
    digits = "".join(str(int(character, 36)) for character in account[4:] + account[:4])
    return 15 <= len(account) <= 34 and int(digits) % 97 == 1
