"""Seeded generator of the embedded pack's grammar minimal pairs.

A template is one or more patterns plus slots. ``{slot}`` is replaced by one of the slot's values, ``[good/bad]`` marks where the
two sentences of the pair differ, and ``{~slot}`` swaps good and bad inside the value (so that one list of verb phrases serves
singular and plural subjects). Patterns of a template take turns, which balances singular against plural exactly.
"""

from __future__ import annotations

import itertools
import json
import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

__all__ = ["ITEMS_PER_TEMPLATE", "SEED", "Template", "generate_pairs", "to_jsonl"]

SEED = 20250517
ITEMS_PER_TEMPLATE = 13

_SLOT = re.compile(r"\{(~?)(\w+)\}")
_CHOICE = re.compile(r"\[([^/\]]*)/([^\]]*)\]")

# Values shared by several templates; a template's own slots come before these.
_SHARED = {
    "person": "farmer|teacher|doctor|student|neighbor|nurse|driver|baker|lawyer|singer|sailor|gardener|painter|tailor",
    "people": "farmers|teachers|doctors|students|neighbors|nurses|drivers|bakers|lawyers|singers|sailors|gardeners|visitors",
    "adj": "old|young|friendly|tired|quiet|famous|busy|kind",
    "when": "every day|every morning|in the evening|on Sundays|after lunch",
    "past_when": "yesterday|last week|this morning|two days ago|last summer",
    "does": "[walks/walk] to the market|[works/work] in the garden|[reads/read] the newspaper|[drinks/drink] coffee"
    "|[sings/sing] in the church|[swims/swim] in the lake|[cooks/cook] for the family|[rides/ride] a bicycle to town",
    "state": "ready to leave|waiting at the door|proud of the result|afraid of the dark|late for dinner|very tired today",
    "thing": "chair|bottle|window|basket|picture|lamp|ladder|carpet|blanket|suitcase",
    "things": "chairs|bottles|windows|baskets|pictures|lamps|ladders|carpets|blankets|suitcases",
    "place": "house|tree|church|garden|bridge|river|fence|wall",
    "places": "houses|trees|churches|gardens|bridges|rivers|fences|walls",
    "buyer": "She bought|We found|He painted|They sold|I borrowed|Anna repaired|My uncle kept",
    "where": "in the kitchen|at the market|in the old barn|behind the school|near the station",
}


@dataclass(frozen=True)
class Template:
    """One kind of minimal pair.

    Attributes
    ----------
    phenomenon, name
        What is tested, and the template's identifier (unit of resampling).
    patterns
        Patterns that take turns.
    slots
        Values of the template's own slots, separated by ``|``.
    """

    phenomenon: str
    name: str
    patterns: tuple[str, ...]
    slots: Mapping[str, str]


def _t(phenomenon: str, name: str, *patterns: str, **slots: str) -> Template:
    return Template(phenomenon, name, patterns, slots)


TEMPLATES: tuple[Template, ...] = (
    # subject and verb agree -------------------------------------------------------------------------------------------
    _t("subject_verb", "sv_habit", "The {adj} {person} {does} {when}.", "The {adj} {people} {~does} {when}."),
    _t(
        "subject_verb",
        "sv_be",
        "The {adj} {person} [is/are] {state}.",
        "The {adj} {people} [are/is] {state}.",
    ),
    _t(
        "subject_verb",
        "sv_have",
        "The {person} [has/have] already {done}.",
        "The {people} [have/has] already {done}.",
        done="left the building|finished the work|paid the bill|closed the door|cleaned the kitchen|read the letter"
        "|heard the news|packed the bags",
    ),
    # a noun of the other number stands between subject and verb -------------------------------------------------------
    _t(
        "agreement_attractor",
        "attractor_place",
        "The {thing} {beside} the {places} [is/are] {look}.",
        "The {things} {beside} the {place} [are/is] {look}.",
        beside="near|behind|beside|in front of",
        look="very old|broken|quite heavy|covered with dust|too expensive|still wet",
    ),
    _t(
        "agreement_attractor",
        "attractor_of",
        "The {one} of the {several} [was/were] {shown}.",
        "The {many} of the {single} [were/was] {shown}.",
        one="picture|map|drawing|painting|story",
        many="pictures|maps|drawings|paintings|stories",
        several="mountains|islands|castles|animals|villages",
        single="mountain|island|castle|animal|village",
        shown="very beautiful|lost in the fire|hidden in a drawer|sold last week|known to everybody",
    ),
    _t(
        "agreement_attractor",
        "attractor_relative",
        "The {person} who {helped} the {people} [is/are] {state}.",
        "The {people} who {helped} the {person} [are/is] {state}.",
        helped="helped|called|visited|thanked|met",
    ),
    # reflexives ------------------------------------------------------------------------------------------------------
    _t(
        "reflexive_gender",
        "reflexive_name",
        "{her} {did} [herself/himself] {past_when}.",
        "{him} {did} [himself/herself] {past_when}.",
        her="Mary|Anna|Susan|Emily|Sarah",
        him="John|Peter|David|Robert|Thomas",
        did="hurt|blamed|introduced|defended|praised",
    ),
    _t(
        "reflexive_gender",
        "reflexive_family",
        "{whose} {her} {did} [herself/himself] {rest}.",
        "{whose} {him} {did} [himself/herself] {rest}.",
        whose="My|Our|Their",
        her="grandmother|mother|sister|aunt|daughter",
        him="grandfather|father|brother|uncle|son",
        did="bought",
        rest="a new coat|a cup of tea|an old piano|a pair of shoes|a small garden",
    ),
    _t(
        "reflexive_gender",
        "reflexive_title",
        "The {her} {did} [herself/himself] {rest}.",
        "The {him} {did} [himself/herself] {rest}.",
        her="queen|princess|woman|girl|actress",
        him="king|prince|man|boy|actor",
        did="looked at|smiled at|talked to",
        rest="in the mirror|in the dark window|in the water|on the old photograph",
    ),
    _t(
        "reflexive_number",
        "reflexive_plural",
        "The {him} {did} [himself/themselves] {rest}.",
        "The {people} {did} [themselves/himself] {rest}.",
        him="king|boy|man|father|prince|waiter",
        did="hid|enjoyed|prepared|washed|protected",
        rest="in the forest|before the party|during the storm|near the river",
    ),
    _t(
        "reflexive_number",
        "reflexive_first",
        "I {did} [myself/ourselves] {rest}.",
        "We {did} [ourselves/myself] {rest}.",
        did="bought|made|cooked|poured",
        rest="a hot meal|some fresh coffee|a large dinner|a glass of juice|some vegetable soup",
    ),
    _t(
        "reflexive_number",
        "reflexive_relative",
        "The {him} who {rel} {did} [himself/themselves].",
        "The {people} who {rel} {did} [themselves/himself].",
        him="king|boy|man|father|prince|actor",
        rel="lived in the castle|met the children|came from the north|opened the gates",
        did="introduced|defended|blamed|surprised",
    ),
    # determiner and noun ---------------------------------------------------------------------------------------------
    _t(
        "determiner_noun",
        "determiner_object",
        "{buyer} [this/these] {thing} {where}.",
        "{buyer} [these/this] {things} {where}.",
    ),
    _t(
        "determiner_noun",
        "noun_object",
        "{buyer} {one} {noun} {where}.",
        "{buyer} {several} {~noun} {where}.",
        one="that|this|a single",
        several="those|these|several",
        noun="[chair/chairs]|[bottle/bottles]|[basket/baskets]|[picture/pictures]|[ladder/ladders]|[carpet/carpets]",
    ),
    _t(
        "determiner_noun",
        "determiner_adjective",
        "[That/Those] {look} {thing} {did}.",
        "[Those/That] {look} {things} {did}.",
        look="old|broken|beautiful|heavy|cheap|small",
        did="belonged to my aunt|came from China|fell into the river|cost a lot of money|stood in the hall",
    ),
    # quantifiers -----------------------------------------------------------------------------------------------------
    _t(
        "quantifier",
        "many_much",
        "There were too [many/much] {things} {where}.",
        "There was too [much/many] {stuff} {where}.",
        stuff="noise|smoke|dust|water|furniture|mud|traffic",
    ),
    _t(
        "quantifier",
        "every_all",
        "Every [{pair}] in the {group} {can}.",
        "All the [{swapped}] in the {group} {can}.",
        pair="student/students|teacher/teachers|visitor/visitors|child/children|singer/singers",
        swapped="students/student|teachers/teacher|visitors/visitor|children/child|singers/singer",
        group="school|town|village|room|group",
        can="knew the song|left early|liked the idea|got a present|wore a red hat",
    ),
    _t(
        "quantifier",
        "few_little",
        "{we} only had a [few/little] {things} left.",
        "{we} only had a [little/few] {stuff} left.",
        we="We|They|I|The shop|My parents",
        things="coins|eggs|apples|candles|books|tickets|potatoes",
        stuff="water|money|bread|flour|oil|coffee|sugar",
    ),
    # negative polarity -----------------------------------------------------------------------------------------------
    _t(
        "negative_polarity",
        "npi_ever",
        "[Nobody/Everybody] in the {group} has ever {seen}.",
        group="village|family|office|school|team|town",
        seen="been to Paris|seen a whale|met the president|heard this song|climbed that mountain|eaten snails",
    ),
    _t(
        "negative_polarity",
        "npi_any",
        "The {person} [never/always] {buys} any {stuff}.",
        buys="buys|eats|wants|sells",
        stuff="bread|cheese|meat|fish|sugar|fruit",
    ),
    _t(
        "negative_polarity",
        "npi_at_all",
        "The {what} was [not/very] {good} at all.",
        what="soup|movie|book|weather|journey|concert|hotel",
        good="good|interesting|bad|cheap|pleasant|surprising",
    ),
    # questions -------------------------------------------------------------------------------------------------------
    _t(
        "question",
        "question_do",
        "{what} did the {person} [{verb}] {past_when}?",
        what="What|Why|When|How",
        verb="sing/sang|speak/spoke|write/wrote|drive/drove|forget/forgot|begin/began|choose/chose",
    ),
    _t(
        "question",
        "question_order",
        "{why} [is the {person}/the {person} is] {doing}?",
        why="Why|Where|How long",
        doing="waiting|working today|sleeping now|singing|walking so slowly",
    ),
    _t(
        "question",
        "question_agree",
        "[Does/Do] the {person} {live} {when}?",
        "[Do/Does] the {people} {live} {when}?",
        live="work here|drink tea|play chess|read books|clean the house",
    ),
    # irregular verbs -------------------------------------------------------------------------------------------------
    _t(
        "irregular_verb",
        "irregular_past",
        "The {person} {did} {past_when}.",
        did="[wrote/written] a letter|[broke/broken] a glass|[drove/driven] to the coast|[ate/eaten] an apple|[took/taken] the bus"
        "|[saw/seen] a fox|[gave/given] a speech|[chose/chosen] a new color",
    ),
    _t(
        "irregular_verb",
        "irregular_participle",
        "The {person} has {done} {twice}.",
        done="[written/wrote] a letter|[broken/broke] the glass|[driven/drove] to the coast|[taken/took] the bus"
        "|[seen/saw] the film|[forgotten/forgot] the keys|[spoken/spoke] to the mayor|[worn/wore] that hat",
        twice="again|twice|many times|this week",
    ),
    _t(
        "irregular_verb",
        "irregular_regular",
        "The {person} {did} {past_when}.",
        did="[caught/catched] a big fish|[taught/teached] the children|[bought/buyed] a new car|[brought/bringed] some flowers"
        "|[built/builded] a small house|[lost/losed] the game|[told/telled] a long story|[fought/fighted] with a thief",
    ),
    # forms after auxiliaries -----------------------------------------------------------------------------------------
    _t(
        "auxiliary",
        "modal_form",
        "The {person} {must} {do} {when}.",
        must="must|should|will|can|might",
        do="[walk/walks] to the market|[work/works] in the garden|[read/reads] the newspaper|[feed/feeds] the horses"
        "|[sing/sings] in the church|[cook/cooks] for the family",
    ),
    _t(
        "auxiliary",
        "progressive_form",
        "The {person} is {doing} {now}.",
        "The {people} are {doing} {now}.",
        doing="[singing/sing] a song|[washing/wash] the car|[reading/read] a book|[carrying/carry] a box|[painting/paint] the door"
        "|[drinking/drink] some tea",
        now="now|at the moment|right now|again",
    ),
    _t(
        "auxiliary",
        "perfect_progressive",
        "The {person} has been {doing} {for_long}.",
        "The {people} have been {doing} {for_long}.",
        doing="[waiting/wait] here|[working/work] there|[living/live] in this town|[sleeping/sleep]|[traveling/travel]",
        for_long="for hours|since Monday|for a long time|all day",
    ),
    # argument structure ----------------------------------------------------------------------------------------------
    _t(
        "argument_structure",
        "two_objects",
        "The {person} {told} {past_when}.",
        told="[told/said] the children a story|[told/said] the visitors the truth|[showed/explained] us the rules"
        "|[gave/described] the boy a present|[sent/suggested] me a letter|[offered/discussed] the guests some cake",
    ),
    _t(
        "argument_structure",
        "no_object",
        "The {people} {did} {past_when}.",
        did="[sat/put] on the wooden bench|[waited/expected] for the bus|[listened/heard] to the radio|[looked/saw] at the pictures"
        "|[arrived/reached] at the station|[slept/spent] on the sofa|[laughed/mocked] at the joke",
    ),
    _t(
        "argument_structure",
        "needs_object",
        "The {people} {did} {past_when}.",
        did="[found/searched] the lost keys in the grass|[met/talked] the mayor|[watched/looked] the game|[reached/arrived] the village"
        "|[visited/went] the museum|[carried/fell] the heavy boxes|[opened/knocked] the front door|[paid/spoke] the waiter",
    ),
    # pronoun case ----------------------------------------------------------------------------------------------------
    _t(
        "pronoun_case",
        "case_subject",
        "[{who}] {did} {past_when}.",
        who="He/Him|She/Her|They/Them|We/Us|I/Me",
        did="worked in the garden|walked to the market|missed the train|cleaned the kitchen|found a wallet|sold the car",
    ),
    _t(
        "pronoun_case",
        "case_object",
        "The {person} {saw} [{whom}] {where}.",
        saw="saw|met|helped|found|called",
        whom="him/he|them/they|us/we|me/I",
    ),
    _t(
        "pronoun_case",
        "case_preposition",
        "The {people} {went} [{whom}] {past_when}.",
        went="went to the cinema with|sat down beside|bought a ticket for|asked a question about|sent a card to",
        whom="him/he|them/they|us/we|me/I",
    ),
    # comparison ------------------------------------------------------------------------------------------------------
    _t(
        "comparison",
        "comparative_er",
        "The {person} is [{older}] than the {other}.",
        older="older/old|taller/tall|stronger/strong|younger/young|richer/rich|faster/fast",
        other="painter's brother|old king|other guests|new boss|rest of us|young man",
    ),
    _t(
        "comparison",
        "comparative_more",
        "The {thing} is [more/most] {adj} than the {other}.",
        adj="expensive|beautiful|useful|important|comfortable",
        other="table|mirror|clock|cupboard|shelf",
    ),
    _t(
        "comparison",
        "comparative_as",
        "The {thing} was as [{old}] as the {other}.",
        old="old/older|heavy/heavier|cheap/cheaper|clean/cleaner|small/smaller",
        other="table|mirror|clock|cupboard|shelf",
    ),
    # verb complements ------------------------------------------------------------------------------------------------
    _t(
        "verb_complement",
        "complement_to",
        "The {people} {decided} to {do} {later}.",
        decided="decided|wanted|hoped|planned|agreed",
        do="[leave/leaving] the city|[build/building] a bridge|[sell/selling] the house|[visit/visiting] the museum|[cross/crossing] the lake",
        later="in May|next year|before winter|at last",
    ),
    _t(
        "verb_complement",
        "complement_ing",
        "The {person} {enjoys} {doing} {when}.",
        enjoys="enjoys|avoids|keeps|practices",
        doing="[reading/read] long novels|[cleaning/clean] the kitchen|[driving/drive] in the city|[writing/write] letters"
        "|[singing/sing] old songs",
    ),
    _t(
        "verb_complement",
        "complement_bare",
        "The {person} {made} the {group} {do}.",
        made="made|let|helped",
        group="children|boys|girls|guests|students",
        do="[wash/washed] the dishes|[carry/carried] the bags|[wait/waited] outside|[sing/sang] a song|[open/opened] the presents",
    ),
    # tense and time --------------------------------------------------------------------------------------------------
    _t(
        "tense",
        "tense_past",
        "{Past} the {people} {did}.",
        Past="Yesterday|Last year|Two weeks ago|Last night",
        did="[visited/visit] the museum|[walked/walk] to the river|[crossed/cross] the lake|[played/play] chess|[cleaned/clean] the house"
        "|[watched/watch] a film",
    ),
    _t(
        "tense",
        "tense_future",
        "{Next} the {people} [will/did] {do}.",
        Next="Tomorrow|Next week|Next year|Some day soon",
        do="visit the museum|sell the house|travel to Spain|build a new bridge|return to the village|celebrate the victory",
    ),
    _t(
        "tense",
        "tense_perfect",
        "By the time we arrived, the {what} had {done}.",
        what="visitors|children|old man|dog|neighbors|musicians",
        done="[left/leave]|already [disappeared/disappear]|[fallen/fall] asleep|already [eaten/eat]|[gone/go] home",
    ),
    # articles --------------------------------------------------------------------------------------------------------
    _t(
        "article",
        "article_noun",
        "{who} {took} [an/a] {vowel} {where}.",
        "{who} {took} [a/an] {consonant} {where}.",
        who="She|He|My sister|The boy|The old man",
        took="saw|bought|found|lost",
        vowel="apple|orange|egg|umbrella|onion|elephant|envelope",
        consonant="banana|lemon|pear|ticket|book|camel|hammer",
    ),
    _t(
        "article",
        "article_adjective",
        "It was [an/a] {vowel} {what}.",
        "It was [a/an] {consonant} {what}.",
        vowel="interesting|unusual|early|exciting|important|old",
        consonant="boring|surprising|long|wonderful|very strange|new",
        what="story|meeting|journey|concert|question|film",
    ),
    _t(
        "article",
        "article_number",
        "{buyer} a [{pair}] {where}.",
        "{buyer} two [{swapped}] {where}.",
        pair="chair/chairs|bottle/bottles|basket/baskets|ladder/ladders|blanket/blankets",
        swapped="chairs/chair|bottles/bottle|baskets/basket|ladders/ladder|blankets/blanket",
    ),
    # there is, there are ---------------------------------------------------------------------------------------------
    _t(
        "existential",
        "there_present",
        "There [is/are] a {look} {thing} {where}.",
        "There [are/is] {many} {look} {things} {where}.",
        look="broken|new|heavy|red|small",
        many="two|some|three|many",
    ),
    _t(
        "existential",
        "there_past",
        "There [was/were] only one {person} {where}.",
        "There [were/was] only two {people} {where}.",
    ),
    _t(
        "existential",
        "there_perfect",
        "There [has/have] been a {event} {here} recently.",
        "There [have/has] been {many} {events} {here} recently.",
        event="fire|storm|meeting|robbery|wedding|flood",
        events="fires|storms|meetings|robberies|weddings|floods",
        here="here|in this town|in our street|near the harbor",
        many="several|two|some|many",
    ),
)


def _expansions(pattern: str, slots: Mapping[str, str]) -> list[str]:
    """All ways to fill the pattern's slots, the ``[good/bad]`` marks still in place."""
    names = list(dict.fromkeys(_SLOT.findall(pattern)))
    columns = []
    for swap, name in names:
        values = slots[name].split("|")
        columns.append([_CHOICE.sub(r"[\2/\1]", value) for value in values] if swap else values)
    filled = []
    for values in itertools.product(*columns):
        chosen = dict(zip(names, values, strict=True))
        filled.append(_SLOT.sub(lambda match, chosen=chosen: chosen[(match[1], match[2])], pattern))  # type: ignore[misc]
    return filled


def _pairs(template: Template, seed: int) -> Iterator[tuple[str, str]]:
    """Endless only in appearance: stops when a pattern of the template is used up."""
    rng = random.Random(f"{seed}/{template.name}")
    pools = []
    for pattern in template.patterns:
        pool = _expansions(pattern, {**_SHARED, **template.slots})
        rng.shuffle(pool)
        pools.append(pool)
    for row in zip(*pools, strict=False):
        for marked in row:
            yield _CHOICE.sub(r"\1", marked), _CHOICE.sub(r"\2", marked)


def generate_pairs(seed: int = SEED, per_template: int = ITEMS_PER_TEMPLATE) -> list[dict[str, str]]:
    """Generate the minimal pairs, the same for the same seed.

    Parameters
    ----------
    seed
        Decides which fillings are drawn.
    per_template
        Pairs of each template.

    Returns
    -------
    list of dict
        Keys ``id``, ``phenomenon``, ``template``, ``good``, ``bad``; no sentence occurs twice.
    """
    items: list[dict[str, str]] = []
    seen: set[str] = set()
    for template in TEMPLATES:
        pairs = _pairs(template, seed)
        index = 0
        while index < per_template:
            good, bad = next(pairs)
            if good in seen or bad in seen:
                continue
            seen.update((good, bad))
            items.append(
                {
                    "id": f"grammar/{template.name}/{index:02d}",
                    "phenomenon": template.phenomenon,
                    "template": template.name,
                    "good": good,
                    "bad": bad,
                }
            )
            index += 1
    return items


def to_jsonl(items: list[dict[str, str]]) -> str:
    """Render items as JSONL, one object a line, ASCII, keys in the order given."""
    return "".join(json.dumps(item) + "\n" for item in items)
